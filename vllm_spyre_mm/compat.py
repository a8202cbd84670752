# SPDX-License-Identifier: Apache-2.0
"""Makes ``import torchvision`` work where its compiled operators cannot be loaded.

Builds of torchvision made for another PyTorch (a CUDA build beside CPU-only PyTorch, for one)
skip their operator library in silence, and then fail at import because ``torchvision::nms`` has
no schema. Image transforms need none of those operators, so declaring the schemas is enough.
"""

import functools
import importlib.machinery
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_NMS_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
"""Signature that torchvision gives to both ``nms`` and ``qnms``."""

_OP_LIBRARIES = ("_C_stable", "_C")
"""Names of torchvision's operator library: of builds for PyTorch's stable ABI, and of others."""


def ensure_torchvision_importable() -> None:
    """Declare the operator schemas that torchvision misses when its op library does not load.

    Does nothing where torchvision is absent, already imported, or whole: there its own library
    is loaded (as importing torchvision would do), so that no schema is ever declared twice.
    May be called any number of times, and must be called once in every process before the first
    import of torchvision.
    """
    folder = _torchvision_folder()
    if folder is None:
        return
    import torch

    if hasattr(torch.ops.torchvision, "nms") or _load_op_library(folder):
        return
    _declare_schemas()


def _torchvision_folder() -> Path | None:
    """Folder of the installed torchvision package, or None; nothing is imported."""
    try:
        spec = importlib.util.find_spec("torchvision")
    except ValueError:  # a stand-in module without a spec sits in sys.modules
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _load_op_library(folder: Path) -> bool:
    """Load torchvision's operator library from `folder`; False if that is impossible."""
    import torch

    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    finder = importlib.machinery.FileFinder(str(folder), loader)
    for name in _OP_LIBRARIES:
        spec = finder.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        try:
            torch.ops.load_library(spec.origin)
        except OSError:
            return False
        return True
    return False


@functools.cache
def _declare_schemas() -> "torch.library.Library":
    """Declare ``torchvision::nms`` and ``torchvision::qnms``, without any kernel.

    The schemas live as long as the returned object, which the cache keeps for ever.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + _NMS_SIGNATURE)
    return library

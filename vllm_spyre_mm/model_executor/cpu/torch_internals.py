# SPDX-License-Identifier: Apache-2.0
"""What compiled code leans on of PyTorch's own parts, and how releases of PyTorch differ there.

Nothing else asks which release is installed, or whether it has something. Each difference names the
release that ends it: once that is older than any that is supported, the difference goes.
"""

import ctypes
import functools
import importlib
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch

COMPILER: Mapping[str, tuple[str, ...]] = {
    "torch._dynamo.convert_frame": ("fullgraph_capture",),
    "torch._dynamo.utils": ("dynamo_timed", "get_metrics_context"),
    "torch._dynamo.variables.torch_function": ("torch_function_mode_stack_state_mgr",),
    "torch._guards": ("TracingContext", "tracing"),
    "torch._inductor.async_compile": ("shutdown_compile_workers",),
    "torch._inductor.codecache": ("CacheBase", "CppCodeCache"),
    "torch._inductor.compile_fx": ("compile_fx",),
    "torch._inductor.cpp_builder": ("get_cpp_compiler",),
    "torch._inductor.cpu_vec_isa": ("pick_vec_isa",),
}
"""Modules, and what is taken of them to make a graph or a kernel."""


@functools.cache
def why_not_compiled() -> str | None:
    """A sentence that says what PyTorch lacks of :data:`COMPILER`; None if it lacks nothing."""
    missing = [
        f"{module}.{name}"
        for module, names in COMPILER.items()
        for name in names
        if not _has(module, name)
    ]
    return f"PyTorch {torch.__version__} has no {', '.join(missing)}" if missing else None


def _has(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False


def has_onednn() -> bool:
    """Whether PyTorch was built with oneDNN; without it the operators of ``mkldnn`` are missing."""
    return torch.backends.mkldnn.is_available()


def packs_linears() -> bool:
    """Whether PyTorch was built with oneDNN, and has its linear layer of a rearranged weight."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return has_onednn() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def takes_architecture() -> bool:
    """Whether Inductor can be told what to compile for, in place of the machine at hand.

    Ends with 2.11 and 2.12, which compile graphs with every instruction that the machine has.
    """
    from torch._inductor import config

    return hasattr(config.cpp, "march")


def inductor_settings(march: str, simdlen: int) -> AbstractContextManager[None]:
    """A context in which Inductor compiles for an architecture, as far as it can be told.

    Args:
        march: of GCC and Clang.
        simdlen: bits of its vectors; 1 for none.
    """
    from torch._inductor import config

    settings: dict[str, object] = {"cpp.simdlen": simdlen}
    if takes_architecture():
        settings["cpp.march"] = march
    return config.patch(settings)


def load_library(text: str, flags: Sequence[str]) -> ctypes.CDLL:
    """Compile C++ that says itself which instructions it uses, or find it in Inductor's cache.

    Args:
        text: of the one file; the cache goes by it and the flags.
        flags: of the compiler; they come last, and an architecture among them holds.
    """
    from torch._inductor import config
    from torch._inductor.codecache import CppCodeCache

    if _may_leave_vectors_out():
        return CppCodeCache.load(text, extra_flags=flags, needs_vec_isa=False)
    with config.patch({"cpp.simdlen": 1}):  # no instruction set is that narrow: none adds flags
        return CppCodeCache.load(text, extra_flags=flags)


def _may_leave_vectors_out() -> bool:
    """Whether the code cache can be told to add no flags of vectors; ends with 2.11 and 2.12."""
    from torch._inductor.codecache import CppCodeCache

    return "needs_vec_isa" in inspect.signature(CppCodeCache.load_async).parameters

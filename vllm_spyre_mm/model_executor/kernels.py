# SPDX-License-Identifier: Apache-2.0
"""C++ that is compiled for the model at hand, by Inductor's tool chain and into its cache."""

import ctypes
import functools
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import torch

HEADERS = (
    *("attend_tiles.h", "attend_vectors.h", "attention_operands.h"),
    *("matrices.h", "rotation.h", "tiles.h", "vectors.h"),
)
"""What kernels may include; a header may include those after it."""

POINTER, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
"""Types of arguments."""


def compile_kernel(
    name: str,
    constants: Mapping[str, int],
    arguments: list[Any],
    returns: Any = None,
) -> Callable[..., Any]:
    """Compile a kernel, or find it in Inductor's cache.

    Args:
        name: of the C++ function, and of its file beside this one.
        constants: what the file wants defined.
        arguments: types of its arguments, of :mod:`ctypes`.
        returns: type of what it returns, None for nothing.
    """
    from torch._inductor.codecache import CppCodeCache

    files = resources.files(__package__)
    source = files.joinpath(f"{name}.cpp").read_text()
    # In place: the cache goes by the text, and would not see another text of a header.
    for header in HEADERS:
        source = source.replace(f'#include "{header}"', files.joinpath(header).read_text())
    defines = "".join(f"#define {key} {value}\n" for key, value in constants.items())
    # Inductor keeps products and sums apart, to round as PyTorch does.
    library = CppCodeCache.load(defines + source, extra_flags=("-ffp-contract=fast",))
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, returns
    return function


@functools.cache
def has_matrix_unit() -> bool:
    """Whether this process may multiply bf16 matrices in hardware (AMX); asks for it."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False)) and torch.cpu._init_amx()


def heads_side_by_side(part: torch.Tensor) -> torch.Tensor:
    """``(batch, tokens, heads, head_dim)`` whose heads of a token follow each other; copied if not.

    A view of what holds queries, keys and values together is taken as it is.
    """
    return part if part.stride()[2:] == (part.shape[3], 1) else part.contiguous()

# SPDX-License-Identifier: Apache-2.0
"""C++ kernels, compiled for the model and the CPU tier at hand by Inductor's tool chain."""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from vllm_spyre_mm.config import CpuTier
from vllm_spyre_mm.model_executor.cpu.tier import (
    INSTRUCTIONS,
    compiler_settings,
    cpu_tier,
    has_tier,
    is_x86,
)

HEADERS = (
    *("decode_amx.h", "decode_avx512.h", "decode_simd.h", "attention_operands.h"),
    *("linear_amx.h", "linear_avx512.h", "linear_product.h", "rows_amx.h", "rows_avx512.h"),
    *("linear_epilogue.h", "linear_pack.h", "linear_problem.h"),
    *("rope.h", "tiles.h", "amx.h", "avx512.h", "bf16.h", "simd.h"),
)
"""What kernels may include; a header may include those after it."""

POINTER, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
"""Types of arguments."""


@dataclass(frozen=True, eq=False, slots=True)  # one of a kind: hashed by identity, at each call
class Kernel:
    """A C++ function, in a file of its name beside this one.

    Attributes:
        name: of the function.
        tiers: for which there is code of its own, lowest first. A tier between or above two of
            them runs that of the lower one, compiled for itself.
        dtypes: that it computes in.
        arguments: their types, of :mod:`ctypes`.
        returns: the type of what it returns, None for nothing.
    """

    name: str
    tiers: tuple[CpuTier, ...]
    dtypes: tuple[torch.dtype, ...]
    arguments: tuple[Any, ...]
    returns: Any = None

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether there is code for such numbers in the process's tier."""
        return dtype in self.dtypes and has_tier(self.tiers[0])

    def load(self, **constants: int) -> Callable[..., Any]:
        """The compiled function, for what the file wants defined; compiled once a process."""
        return compile_kernel(self, cpu_tier(), tuple(constants.items()))


@functools.cache
def compile_kernel(
    kernel: Kernel, tier: CpuTier, constants: tuple[tuple[str, int], ...]
) -> Callable[..., Any]:
    """Compile a kernel for a tier, or find it in Inductor's cache."""
    from torch._inductor.codecache import CppCodeCache

    defines = "".join(f"#define {key} {value}\n" for key, value in constants)
    if not is_x86():  # compiled for the machine at hand: no other may find it
        defines += f"// {sorted(torch.cpu.get_capabilities().items())}\n"
    # Inductor keeps products and sums apart, to round as PyTorch does.
    flags = ("-ffp-contract=fast", *(INSTRUCTIONS[tier].flags if is_x86() else ()))
    with compiler_settings():
        text = defines + source(kernel.name)
        library = CppCodeCache.load(text, extra_flags=flags, needs_vec_isa=False)
    function = getattr(library, kernel.name)
    function.argtypes, function.restype = kernel.arguments, kernel.returns
    return function


def source(name: str) -> str:
    """The text of a kernel, with its headers in place.

    The compile cache goes by the text, and would not see another text of a header.
    """
    files = resources.files(__package__)
    text = files.joinpath(f"{name}.cpp").read_text()
    for header in HEADERS:
        text = text.replace(f'#include "{header}"', files.joinpath(header).read_text())
    return text


def heads_side_by_side(part: torch.Tensor) -> torch.Tensor:
    """``(batch, tokens, heads, head_dim)`` whose heads of a token follow each other; copied if not.

    A view of what holds queries, keys and values together is taken as it is.
    """
    return part if part.stride()[2:] == (part.shape[3], 1) else part.contiguous()

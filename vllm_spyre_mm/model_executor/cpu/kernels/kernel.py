# SPDX-License-Identifier: Apache-2.0
"""C++ kernels, compiled by Inductor's tool chain for a model's shapes and the CPU's tier."""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from vllm_spyre_mm.config import CpuTier
from vllm_spyre_mm.model_executor.cpu.tier import (
    compiler_settings,
    cpu_tier,
    has_tier,
    is_x86,
    kernel_flags,
)
from vllm_spyre_mm.model_executor.cpu.torch_internals import load_library

HEADERS = (
    *("decode_amx.h", "decode_avx512.h", "decode_simd.h", "attention_operands.h"),
    *("linear_amx.h", "linear_avx512.h", "linear_product.h", "rows_amx.h", "rows_avx512.h"),
    *("linear_epilogue.h", "linear_pack.h", "linear_problem.h"),
    *("rope.h", "tiles.h", "amx.h", "avx512.h", "bf16.h", "simd.h"),
)
"""The headers that kernels include. The order matters: a header may include those after it."""

POINTER, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
"""Types of a kernel's arguments."""


@dataclass(frozen=True, eq=False, slots=True)  # hashed by identity, which is fast
class Kernel:
    """A C++ function, in the file ``NAME.cpp`` beside this one.

    Attributes:
        name: of the function.
        tiers: the tiers with code of their own, lowest first. A tier between or above them compiles
            the code of the next lower one.
        dtypes: the dtypes that it computes in.
        arguments: types of its arguments, of :mod:`ctypes`.
        returns: type of its result, None for nothing.
    """

    name: str
    tiers: tuple[CpuTier, ...]
    dtypes: tuple[torch.dtype, ...]
    arguments: tuple[Any, ...]
    returns: Any = None

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether there is code for the dtype in the process's tier."""
        return dtype in self.dtypes and has_tier(self.tiers[0])

    def load(self, **constants: int) -> Callable[..., Any]:
        """Return the compiled function.

        Args:
            constants: values of the macros that the file needs.
        """
        return compile_kernel(self, cpu_tier(), tuple(constants.items()))


@functools.cache
def compile_kernel(
    kernel: Kernel, tier: CpuTier, constants: tuple[tuple[str, int], ...]
) -> Callable[..., Any]:
    """Compile a kernel for a tier, or find it in Inductor's cache."""
    defines = "".join(f"#define {key} {value}\n" for key, value in constants)
    if not is_x86():  # compiled for the machine at hand: others must not find it in a shared cache
        defines += f"// {sorted(torch.cpu.get_capabilities().items())}\n"
    # Inductor's default forbids fused multiply-adds, to round as PyTorch does.
    flags = ("-ffp-contract=fast", *kernel_flags(tier))
    with compiler_settings():
        library = load_library(defines + kernel_source(kernel.name), flags)
    function = getattr(library, kernel.name)
    function.argtypes, function.restype = kernel.arguments, kernel.returns
    return function


def kernel_source(name: str) -> str:
    """The text of a kernel, with its headers inlined.

    The compile cache's key is the text, which has to change when a header changes.
    """
    files = resources.files(__package__)
    text = files.joinpath(f"{name}.cpp").read_text()
    for header in HEADERS:
        text = text.replace(f'#include "{header}"', files.joinpath(header).read_text())
    return text


def with_contiguous_heads(part: torch.Tensor) -> torch.Tensor:
    """``(batch, tokens, heads, head_dim)`` with each token's heads contiguous; copied if needed.

    A view into a fused QKV projection is used as it is.
    """
    return part if part.stride()[2:] == (part.shape[3], 1) else part.contiguous()

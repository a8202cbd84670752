# SPDX-License-Identifier: Apache-2.0
"""The compiled linear layer of the few rows of a decode, for a weight that stays as it is stored.

That of a head that is tied to the embedding: oneDNN would rearrange it at each call. Many rows are
left to it.
"""

import functools
from collections.abc import Callable

import torch

from vllm_spyre_mm.model_executor.kernels import (
    POINTER,
    SIZE,
    compile_kernel,
    has_matrix_unit,
)

MAX_ROWS = 32
"""Beyond this oneDNN is the faster one."""

BLOCK = 32
"""The kernel takes rows whose width is a multiple of this, and at least so many outputs."""


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel computes this, for a matrix ``x``, on this machine."""
    fits = len(x) <= MAX_ROWS and x.shape[1] % BLOCK == 0 and len(weight) >= BLOCK
    return fits and weight.dtype == torch.bfloat16 and has_matrix_unit()


def rows_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``(rows, width)`` to ``(rows, outputs)``.

    Args:
        x: bf16; :func:`takes` has accepted it.
        weight: ``(outputs, width)``, bf16, contiguous.
        bias: ``(outputs,)``, bf16.
    """
    x = x.contiguous()
    out = x.new_empty(len(x), len(weight))
    kernel()(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        len(x),
        x.shape[1],
        len(weight),
    )
    return out


@functools.cache
def kernel() -> Callable[..., None]:
    """Compile, or find it in Inductor's cache."""
    return compile_kernel("rows_linear", {}, [*[POINTER] * 4, *[SIZE] * 3])

# SPDX-License-Identifier: Apache-2.0
"""The kernel for a linear layer of a decode's few rows, with a row-major weight.

It serves LM heads that are tied to the embedding, whose weight oneDNN would pack at each call. With
many rows oneDNN is used.
"""

import torch

from vllm_spyre_mm.model_executor.cpu.kernels.kernel import POINTER, SIZE, Kernel

KERNEL = Kernel(
    "rows_linear",
    ("avx512", "avx512_bf16", "amx"),
    (torch.bfloat16,),
    (*[POINTER] * 4, *[SIZE] * 3),
)

MAX_ROWS = 32
"""Number of rows beyond which oneDNN is faster."""

BLOCK = 32
"""The kernel requires a width that is a multiple of this, and at least this many outputs."""


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel computes this, for a matrix ``x``, on this machine."""
    fits = len(x) <= MAX_ROWS and x.shape[1] % BLOCK == 0 and len(weight) >= BLOCK
    return fits and KERNEL.takes(weight.dtype)


def rows_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Linear layer from ``(rows, width)`` to ``(rows, outputs)``.

    Args:
        x: bf16; :func:`takes` has accepted it.
        weight: ``(outputs, width)``, bf16, contiguous.
        bias: ``(outputs,)``, bf16.
    """
    x = x.contiguous()
    out = x.new_empty(len(x), len(weight))
    KERNEL.load()(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        len(x),
        x.shape[1],
        len(weight),
    )
    return out

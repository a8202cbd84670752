# SPDX-License-Identifier: Apache-2.0
"""The compiled search for the largest number of each row: greedy sampling.

Each row by one thread; PyTorch's own goes through the numbers one by one, NumPy's has one thread.
"""

import functools
from collections.abc import Callable

import torch

from vllm_spyre_mm.model_executor.kernels import POINTER, SIZE, compile_kernel


def largest(numbers: torch.Tensor) -> torch.Tensor:
    """The index of the first of the largest of each row; NaN is larger than all.

    Args:
        numbers: fp32 ``(rows, width)``, contiguous.

    Returns:
        int64 ``(rows,)``.
    """
    rows, width = numbers.shape
    out = torch.empty(rows, dtype=torch.int64)
    kernel()(numbers.data_ptr(), out.data_ptr(), rows, width)
    return out


@functools.cache
def kernel() -> Callable[..., None]:
    """Compile, or find it in Inductor's cache."""
    return compile_kernel("largest", {}, [POINTER, POINTER, SIZE, SIZE])

# SPDX-License-Identifier: Apache-2.0
"""The compiled search for the largest number of each row: greedy sampling.

Each row by one thread; PyTorch's own goes through the numbers one by one, NumPy's has one thread.
"""

import torch

from vllm_spyre_mm.model_executor.kernels import POINTER, SIZE, Kernel

KERNEL = Kernel("largest", ("generic",), (torch.float32,), (POINTER, POINTER, SIZE, SIZE))


def largest(numbers: torch.Tensor) -> torch.Tensor:
    """The index of the first of the largest of each row; NaN is larger than all.

    Args:
        numbers: fp32 ``(rows, width)``, contiguous.

    Returns:
        int64 ``(rows,)``.
    """
    rows, width = numbers.shape
    out = torch.empty(rows, dtype=torch.int64)
    KERNEL.load()(numbers.data_ptr(), out.data_ptr(), rows, width)
    return out

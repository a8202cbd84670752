# SPDX-License-Identifier: Apache-2.0
"""The process's memory."""

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch


def return_free_memory() -> None:
    """Give the operating system what is free; glibc would keep it.

    For the moments after a great deal was needed once: replaced weights, a compilation.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def empty_in_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory of its own for what is read from end to end again and again.

    With pages of 4 KiB the processor looks up an address every few rows. Where the system has no
    huge pages, it is in small ones.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)

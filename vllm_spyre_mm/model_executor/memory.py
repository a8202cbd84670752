# SPDX-License-Identifier: Apache-2.0
"""The process's memory."""

import contextlib
import ctypes
import functools
import math
import mmap
from collections.abc import Iterator, Sequence

import torch

from vllm_spyre_mm.model_executor.kernels import compile_kernel

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""

SEPARATE_BYTES = 1 << 20
"""Blocks of this size and more are large."""

HEAP_BYTES = 1 << 25
"""The most that glibc takes from its heap: by itself it does so once it has seen such a block."""


@contextlib.contextmanager
def separate_large_blocks() -> Iterator[None]:
    """Give large blocks that are allocated here pages of their own, which go when they are freed.

    For weights that are replaced one after the other: in glibc's heap they would leave as much free
    memory as they took, through which later blocks wander. What is allocated after this comes from
    the heap, whose pages are there already.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, SEPARATE_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, HEAP_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2 * HEAP_BYTES)


@functools.cache
def fill_holes() -> None:
    """Let a tensor take the place that another of its size has left in glibc's heap.

    PyTorch's tensors move on through it, and the activations of a chunk take up to twice their
    memory; see ``malloc_allocator.cpp``. It lasts as long as the process.
    """
    compile_kernel("malloc_allocator", {}, [], libraries=("c10",))()


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

# SPDX-License-Identifier: Apache-2.0
"""The process's memory."""

import contextlib
import ctypes
import functools
import math
import mmap
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    return torch.frombuffer(_map(math.prod(shape) * dtype.itemsize), dtype=dtype).view(*shape)


def _map(num_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


@dataclass(slots=True)
class _Block:
    memory: mmap.mmap
    user: weakref.ref[memoryview] | None = None  # what the tensor in it holds

    def is_free(self) -> bool:
        return self.user is None or self.user() is None


class Activations:
    """Large results of one layer after the other, in blocks that are used again at once.

    A block is free when no tensor refers to it any more. glibc (2.36) would not use it again: the
    hole that an aligned block leaves is too small for another of its size once small objects have
    taken the scraps beside it, so that results wander through its heap, which it then gives back
    and takes again, page by page.

    For what lives for moments: a small tensor that is kept would keep a whole block.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """As :func:`torch.empty` on the host; what is small is in memory of its own."""
        count = math.prod(shape)
        num_bytes = count * dtype.itemsize
        if num_bytes < SEPARATE_BYTES:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            block = self._take(num_bytes)
            used = memoryview(block.memory)
            block.user = weakref.ref(used)
        return torch.frombuffer(used, dtype=dtype, count=count).view(*shape)

    def _take(self, num_bytes: int) -> _Block:
        """The smallest free block that is large enough; else a new one, for the largest free."""
        free = sorted((block for block in self._blocks if block.is_free()), key=_size)
        for block in free:
            if len(block.memory) >= num_bytes:
                return block
        if free:
            self._blocks.remove(free[-1])
        block = _Block(_map(num_bytes))
        self._blocks.append(block)
        return block


def _size(block: _Block) -> int:
    return len(block.memory)


@functools.cache
def activations() -> Activations:
    """Those of this process."""
    return Activations()

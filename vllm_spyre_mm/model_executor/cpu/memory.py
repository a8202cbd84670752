# SPDX-License-Identifier: Apache-2.0
"""The process's memory."""

import contextlib
import ctypes
import functools
import math
import mmap
from collections.abc import Iterator, Sequence

import numpy as np
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""

SEPARATE_BYTES = 1 << 20
"""Blocks of this size and more are large."""

HEAP_BYTES = 1 << 25
"""The most that glibc takes from its heap: by itself it does so once it has seen such a block."""

CACHE_LINE = 64
HUGE_PAGE = 1 << 21
REGION_BYTES = 1 << 26
"""Bytes of the processor's, of the system's, and of what is asked for at a time."""


@contextlib.contextmanager
def mmap_threshold() -> Iterator[None]:
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


def empty_result(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """As ``x.new_empty(shape)``, and a large one takes the place that another of its size has left.

    PyTorch asks glibc for blocks aligned to 64 bytes. glibc takes a larger block for that and gives
    what is too much at both ends to small objects; the hole that is left when the block is freed is
    then too small for the next of its size, and the activations of a chunk take up to twice their
    memory. NumPy asks for a plain block; the room for the alignment stays with it.
    """
    if x.is_meta or math.prod(shape) * x.itemsize < SEPARATE_BYTES:
        return x.new_empty(shape)
    num_bytes = math.prod(shape) * x.itemsize
    block = torch.from_numpy(np.empty(num_bytes + CACHE_LINE, dtype=np.uint8))
    start = -block.data_ptr() % CACHE_LINE
    return block[start : start + num_bytes].view(x.dtype).view(*shape)


class HugePages:
    """Memory for what is read from end to end again and again: the weights.

    With pages of 4 KiB the processor looks up an address every few rows. Pieces follow each other,
    so that the pages they share are huge as well; a region goes back with the last piece of it.
    Where the system has no huge pages, it is in small ones.
    """

    def __init__(self) -> None:
        self._left = memoryview(b"")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """As :func:`torch.empty` on the host."""
        count = math.prod(shape)
        num_bytes = -(-count * dtype.itemsize // CACHE_LINE) * CACHE_LINE
        if num_bytes > len(self._left):
            self._left = _map_region(max(num_bytes, REGION_BYTES))
        piece, self._left = self._left[:num_bytes], self._left[num_bytes:]
        return torch.frombuffer(piece, dtype=dtype, count=count).view(*shape)


def _map_region(num_bytes: int) -> memoryview:
    """Memory that begins with a huge page; what is not written takes none."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    return memoryview(memory)[-address % HUGE_PAGE :]


@functools.cache
def huge_pages() -> HugePages:
    """Those of this process."""
    return HugePages()

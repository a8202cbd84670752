# SPDX-License-Identifier: Apache-2.0
"""Host memory of a process: malloc thresholds, reusable blocks, huge pages."""

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

LARGE_BLOCK_BYTES = 1 << 20
"""Size in bytes from which a block counts as large."""

HEAP_BYTES = 1 << 25
"""The mmap threshold after loading: the largest that glibc would adapt to by itself."""

CACHE_LINE = 64
HUGE_PAGE = 1 << 21
REGION_BYTES = 1 << 26
"""Bytes of a cache line, of a huge page, and of a region that is mapped at once."""


@contextlib.contextmanager
def mmap_threshold() -> Iterator[None]:
    """Context in which malloc takes large blocks from mmap, so that freeing returns their pages.

    For weights that are replaced one after the other: in glibc's heap they would leave as much free
    memory as they took, fragmented. After the context blocks come from the heap again, whose pages
    are mapped already.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, HEAP_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2 * HEAP_BYTES)


def empty_result(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Like ``x.new_empty(shape)``, but large results reuse the memory of freed ones of their size.

    PyTorch asks glibc for blocks aligned to 64 bytes. glibc takes a larger block for that and gives
    the rest at both ends to small objects; when the block is freed, the hole is too small for the
    next of its size, and the activations of a chunk take up to twice their memory. NumPy asks for a
    plain block, which keeps the space for the alignment.
    """
    if x.is_meta or math.prod(shape) * x.itemsize < LARGE_BLOCK_BYTES:
        return x.new_empty(shape)
    num_bytes = math.prod(shape) * x.itemsize
    block = torch.from_numpy(np.empty(num_bytes + CACHE_LINE, dtype=np.uint8))
    start = -block.data_ptr() % CACHE_LINE
    return block[start : start + num_bytes].view(x.dtype).view(*shape)


class HugePages:
    """Allocates tensors in transparent huge pages, for weights, which every step reads entirely.

    With pages of 4 KiB there is a TLB miss every few rows. Tensors follow each other, so that the
    pages they share are huge as well; a region is freed with the last of its tensors. Where the
    system has no huge pages, small ones are used.
    """

    def __init__(self) -> None:
        self._left = memoryview(b"")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Like :func:`torch.empty` on the host."""
        count = math.prod(shape)
        num_bytes = -(-count * dtype.itemsize // CACHE_LINE) * CACHE_LINE
        if num_bytes > len(self._left):
            self._left = _map_region(max(num_bytes, REGION_BYTES))
        piece, self._left = self._left[:num_bytes], self._left[num_bytes:]
        return torch.frombuffer(piece, dtype=dtype, count=count).view(*shape)


def _map_region(num_bytes: int) -> memoryview:
    """Map memory that starts at a huge page's boundary; pages are allocated when written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    return memoryview(memory)[-address % HUGE_PAGE :]


@functools.cache
def huge_pages() -> HugePages:
    """The allocator of this process."""
    return HugePages()

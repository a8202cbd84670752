# SPDX-License-Identifier: Apache-2.0
"""Memory that is freed is free for others, where that matters; in a process with a new heap."""

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest
import torch

from vllm_spyre_mm.model_executor.cpu.memory import (
    HEAP_BYTES,
    HUGE_PAGE,
    REGION_BYTES,
    HugePages,
    empty_result,
    mmap_threshold,
)

MIB = 1 << 20


def in_new_process(measure: Callable[[], int]) -> int:
    """What other tests freed would be given out first."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure).result()


def block(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB, dtype=torch.uint8)


def resident() -> int:
    return psutil.Process().memory_info().rss


def freed_bytes() -> int:
    """Of every second of 64 blocks of 2 MiB, by the process."""
    with mmap_threshold():
        pass
    block(HEAP_BYTES // MIB - 1)  # the heap holds so much from here on, and some weights go there
    with mmap_threshold():
        weights: list[torch.Tensor | None] = [block(2) for _ in range(64)]
    before = resident()
    weights[::2] = [None] * 32
    return before - resident()


def faults_again() -> int:
    """Pages that were taken for 128 MiB, in blocks of 16 that had been there before."""
    with mmap_threshold():
        pass
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            block(16)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults


def bytes_for_layers() -> int:
    """Taken for the activations of 64 layers, 20 MiB at a time, with small objects that stay."""
    with mmap_threshold():
        pass
    stay: list[object] = []
    like = torch.empty(0, dtype=torch.uint8)
    before = resident()
    for _ in range(64):
        layer: list[torch.Tensor] = []
        for mib in (3, 5, 3, 9, 3):
            layer.append(empty_result(like, (mib * MIB,)).fill_(1))
            stay.append((bytes(600), [torch.empty(2) for _ in range(4)]))
            del layer[:-3]
    return resident() - before


def test_a_large_block_between_others_goes_when_it_is_freed():
    """As a weight does that is replaced."""
    assert in_new_process(freed_bytes) > 40 * MIB


def test_blocks_after_the_weights_find_their_pages():
    """Pages that go back each time have to be zeroed by the system each time.

    Where the heap lies between others' pages it cannot grow in place, and half of them go back.
    """
    assert in_new_process(faults_again) < 0.75 * 128 * MIB / resource.getpagesize()


def test_activations_take_the_places_of_those_before_them():
    """PyTorch's own tensors take more than 400 MiB."""
    assert in_new_process(bytes_for_layers) < 48 * MIB


@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (1, 600, 1024), (2, 1 << 19)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_result_is_a_tensor_like_any(shape: tuple[int, ...], dtype: torch.dtype):
    result = empty_result(torch.empty(0, dtype=dtype), shape)
    assert (result.shape, result.dtype) == (shape, dtype)
    assert result.is_contiguous()
    assert result.data_ptr() % 64 == 0
    assert torch.equal(result.fill_(3), torch.full(shape, 3, dtype=dtype))


def test_pieces_of_huge_pages_follow_each_other():
    pages = HugePages()
    sizes = [10, 64, 1000, REGION_BYTES // 2, REGION_BYTES, 2 * REGION_BYTES, 7]
    pieces = [pages.empty((size,), torch.uint8) for size in sizes]
    for i, piece in enumerate(pieces):
        piece.fill_(i)
    assert all(torch.all(piece == i) for i, piece in enumerate(pieces))
    starts = [piece.data_ptr() for piece in pieces]
    assert [start % 64 for start in starts] == [0] * len(sizes)
    assert starts[0] % HUGE_PAGE == 0
    assert [start - starts[0] for start in starts[:4]] == [0, 64, 128, 1152]


def test_a_region_goes_with_the_last_piece_of_it():
    pages = HugePages()
    kept = pages.empty((5,), torch.bfloat16)
    before = resident()
    for _ in range(8):
        pages.empty((REGION_BYTES,), torch.uint8).fill_(1)
    assert resident() - before < 4 * REGION_BYTES
    assert kept.fill_(3).sum() == 15

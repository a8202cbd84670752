# SPDX-License-Identifier: Apache-2.0
"""Memory that is freed is free for others, where that matters."""

import resource

import psutil
import torch

from vllm_spyre_mm.model_executor.memory import HEAP_BYTES, separate_large_blocks

MIB = 1 << 20


def block(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB, dtype=torch.uint8)


def resident() -> int:
    return psutil.Process().memory_info().rss


def test_a_large_block_between_others_goes_when_it_is_freed():
    """As a weight does that is replaced."""
    with separate_large_blocks():
        pass
    block(HEAP_BYTES // MIB - 1)  # the heap holds so much from here on, and some weights go there
    with separate_large_blocks():
        weights: list[torch.Tensor | None] = [block(2) for _ in range(64)]
    before = resident()
    weights[::2] = [None] * 32
    assert before - resident() > 40 * MIB


def test_blocks_after_the_weights_find_their_pages():
    """Pages that go back each time have to be zeroed by the system each time."""
    with separate_large_blocks():
        pass
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            block(16)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 16 * MIB // resource.getpagesize()

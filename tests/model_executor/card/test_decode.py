# SPDX-License-Identifier: Apache-2.0
"""A decode's layout is what a loop over the requests would lay out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spyre_mm.model_executor.card.decode import CardDecode, card_decode

PROPERTY = settings(deadline=None, derandomize=True, max_examples=300)
GARBAGE = 999
"""What vLLM's table holds beyond a row's own blocks."""


class Case:
    """Running requests: tokens in the cache, the last token, and the blocks of each.

    Args:
        num_computed: tokens of each request that are in the cache. The positions are others, as
            those behind a picture may be.
        blocks: the block ids of each; some may be there for later tokens.
        block_size: tokens in a block.
    """

    def __init__(self, num_computed: list[int], blocks: list[list[int]], block_size: int) -> None:
        self.num_computed = num_computed
        self.positions = [n - 3 * row for row, n in enumerate(num_computed)]
        self.blocks = blocks
        self.block_size = block_size
        self.token_ids = [11 + 5 * row for row in range(len(num_computed))]

    def lay_out(self) -> CardDecode:
        width = max(map(len, self.blocks))
        rows = [blocks + [GARBAGE] * (width + 1 - len(blocks)) for blocks in self.blocks]
        return card_decode(
            token_ids=np.array(self.token_ids, dtype=np.int32),
            num_computed=np.array(self.num_computed, dtype=np.int32),
            positions=np.array(self.positions, dtype=np.int64),
            block_rows=np.array(rows, dtype=np.int32),
            block_size=self.block_size,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_size = draw(st.sampled_from([1, 2, 4, 64]))
    num_computed = draw(st.lists(st.integers(1, 5 * block_size), min_size=1, max_size=6))
    counts = [n // block_size + 1 + draw(st.integers(0, 2)) for n in num_computed]
    order = draw(st.permutations(range(1, sum(counts) + 3)))
    blocks = [[order.pop() for _ in range(count)] for count in counts]
    return Case(num_computed, blocks, block_size)


@given(cases())
@PROPERTY
def test_every_row_is_what_a_loop_lays_out(case: Case):
    batch, size = case.lay_out(), case.block_size
    counts = [n // size + 1 for n in case.num_computed]
    for row, num_computed in enumerate(case.num_computed):
        own = case.blocks[row][: counts[row]]
        padding_blocks = max(counts) - counts[row]
        assert batch.token_ids[row].tolist() == [case.token_ids[row]]
        assert batch.position_ids[row].tolist() == [case.positions[row]]
        assert batch.slot_mapping[row].tolist() == [own[-1] * size + num_computed % size]
        assert batch.block_table[row].tolist() == [0] * padding_blocks + own
        assert batch.left_padding[row] == padding_blocks * size
        assert batch.current_tkv[row] == padding_blocks * size + num_computed + 1
    assert batch.block_table.shape == (len(case.num_computed), max(counts))


@given(cases())
@PROPERTY
def test_the_block_table_leads_to_each_rows_tokens_and_to_nobody_elses(case: Case):
    """Position by position, from the left padding to the end, as the attention reads."""
    batch, size = case.lay_out(), case.block_size
    for row, num_computed in enumerate(case.num_computed):
        table = batch.block_table[row].tolist()
        start, end = int(batch.left_padding[row]), int(batch.current_tkv[row])
        read = [table[i // size] * size + i % size for i in range(start, end)]
        own = [case.blocks[row][i // size] * size + i % size for i in range(num_computed + 1)]
        assert read == own
        assert read[-1] == batch.slot_mapping[row, 0]
        assert start % size == 0


@given(cases())
@PROPERTY
def test_block_0_takes_no_real_token_and_garbage_is_never_read(case: Case):
    batch = case.lay_out()
    real = batch.slot_mapping[: len(case.num_computed)]
    assert (real >= case.block_size).all()
    assert GARBAGE not in batch.block_table
    slots = real.flatten().tolist()
    assert len(set(slots)) == len(slots), "no two requests write to one row"


@pytest.mark.parametrize(("num_computed", "width"), [(63, 1), (64, 2), (65, 2), (128, 3)])
def test_a_token_at_a_blocks_edge_is_in_the_block_that_it_opens(num_computed: int, width: int):
    batch = Case([num_computed], [[5, 9, 4]], 64).lay_out()
    assert batch.block_table.tolist() == [[5, 9, 4][:width]]
    assert batch.slot_mapping.item() == [5, 9, 4][width - 1] * 64 + num_computed % 64


def test_indices_are_int64():
    batch = Case([3, 70], [[1], [2, 3]], 64).lay_out()
    for name in CardDecode.__dataclass_fields__:
        assert getattr(batch, name).dtype == torch.int64

# SPDX-License-Identifier: Apache-2.0
"""A chunk's layout is what a loop over its tokens would lay out, with padding and without."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spyre_mm.model_executor.step_inputs import PrefillChunk
from vllm_spyre_mm.multimodal.merge import TEXT
from vllm_spyre_mm.scheduler.geometry import Geometry
from vllm_spyre_mm.worker.prefill import prefill_chunk

PROPERTY = settings(deadline=None, derandomize=True, max_examples=300)


@dataclass(frozen=True)
class Case:
    """A prompt, the blocks it has, and the bounds of one of its chunks."""

    geometry: Geometry
    num_tokens: int
    blocks: list[int]
    start: int
    end: int
    positions: np.ndarray | None = None

    @property
    def token_ids(self) -> list[int]:
        """No token id is 0, which stands for padding."""
        return [7 + 3 * position for position in range(self.start, self.end)]

    @property
    def feature_index(self) -> np.ndarray:
        """Every third position takes a feature."""
        rows = np.arange(self.start, self.end)
        return np.where(rows % 3 == 0, rows // 3, TEXT)

    def slot(self, position: int) -> int:
        """Cache row of a position of the prompt's blocks."""
        size = self.geometry.block_size
        return self.blocks[position // size] * size + position % size

    def lay_out(self, padded: bool) -> PrefillChunk:
        return prefill_chunk(
            token_ids=self.token_ids,
            start=self.start,
            num_tokens=self.num_tokens,
            blocks=self.blocks,
            feature_index=self.feature_index,
            positions=self.positions,
            geometry=self.geometry,
            padded=padded,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any chunk of any prompt; sometimes more blocks than it needs are there already."""
    block_size = draw(st.sampled_from([1, 2, 4, 8]))
    geometry = Geometry(block_size, block_size * draw(st.integers(1, 4)), 10**6)
    num_tokens = draw(st.integers(1, 4 * geometry.chunk_size + 1))
    bounds = [0]
    while bounds[-1] < num_tokens:
        bounds.append(geometry.chunk_end(num_tokens, bounds[-1]))
    chunk = draw(st.integers(0, len(bounds) - 2))
    needed = geometry.num_blocks(bounds[chunk + 1])
    count = draw(st.integers(needed, geometry.num_blocks(num_tokens) + 1))
    order = draw(st.permutations(range(1, count + 4)))
    return Case(geometry, num_tokens, order[:count], bounds[chunk], bounds[chunk + 1])


def naive(case: Case) -> dict[int, dict[str, int]]:
    """What each position of the padded chunk holds; positions are padded ones."""
    geometry = case.geometry
    left = geometry.left_padding(case.num_tokens)
    first = (case.start + left) // geometry.chunk_size * geometry.chunk_size
    padded_length = left + geometry.num_blocks(case.num_tokens) * geometry.block_size
    rows = {}
    for padded in range(first, first + geometry.chunk_size):
        position = padded - left
        row = {"token": 0, "position": 0, "feature": TEXT, "padding": 1}
        if position < 0:
            row["slot"] = padded % geometry.block_size  # of block 0
        else:
            row["slot"] = case.slot(position)
            if position < case.num_tokens:
                i = position - case.start
                row |= {
                    "token": case.token_ids[i],
                    "position": position,
                    "feature": int(case.feature_index[i]),
                    "padding": 0,
                }
        assert padded < padded_length
        rows[padded] = row
    return rows


@given(cases())
@PROPERTY
def test_a_padded_chunk_is_what_a_loop_lays_out(case: Case):
    chunk, rows = case.lay_out(padded=True), naive(case)
    for name, tensor in [
        ("token", chunk.token_ids),
        ("position", chunk.position_ids),
        ("feature", chunk.feature_index),
        ("padding", chunk.is_padding),
        ("slot", chunk.slot_mapping),
    ]:
        assert tensor.shape == (1, case.geometry.chunk_size)
        assert tensor[0].int().tolist() == [row[name] for row in rows.values()]


@given(cases(), st.booleans())
@PROPERTY
def test_positions_on_three_axes_lie_where_those_on_one_do(case: Case, padded: bool):
    plain = case.lay_out(padded)
    positions = np.arange(case.start, case.end) + np.array([[100], [200], [300]])
    chunk = replace(case, positions=positions).lay_out(padded)
    expected = torch.where(plain.is_padding, 0, plain.position_ids + positions[:, :1] - case.start)
    assert torch.equal(chunk.position_ids, expected)
    assert str(chunk.position_ids.dtype) == "torch.int64"


@given(cases())
@PROPERTY
def test_the_block_table_leads_to_every_slot_of_a_padded_chunk(case: Case):
    """Reading position by position finds what the chunk wrote; padding is read from block 0."""
    chunk, size = case.lay_out(padded=True), case.geometry.block_size
    table = chunk.block_table[0].tolist()
    left_padding = case.geometry.left_padding(case.num_tokens)
    end = int(chunk.current_tkv)
    assert chunk.left_padding.tolist() == [left_padding]
    assert end == max(naive(case)) + 1
    assert len(table) == end // size
    assert table[: left_padding // size] == [0] * (left_padding // size)
    read = [table[padded // size] * size + padded % size for padded in naive(case)]
    assert chunk.slot_mapping[0].tolist() == read


@given(cases())
@PROPERTY
def test_an_unpadded_chunk_is_its_tokens_alone(case: Case):
    chunk, size = case.lay_out(padded=False), case.geometry.block_size
    positions = list(range(case.start, case.end))
    assert chunk.token_ids.tolist() == [case.token_ids]
    assert chunk.position_ids.tolist() == [positions]
    assert chunk.feature_index.tolist() == [case.feature_index.tolist()]
    assert chunk.slot_mapping.tolist() == [[case.slot(position) for position in positions]]
    assert not chunk.is_padding.any()
    assert chunk.block_table.tolist() == [case.blocks[: -(-case.end // size)]]
    assert chunk.left_padding.tolist() == [0]
    assert chunk.current_tkv.tolist() == [case.end]
    assert chunk.last_row == -1


@given(cases(), st.booleans())
@PROPERTY
def test_the_last_row_is_that_of_the_last_real_token(case: Case, padded: bool):
    """Counted from the end, inside the last block, so that a block's logits hold it."""
    chunk = case.lay_out(padded)
    assert chunk.token_ids[0, chunk.last_row] == case.token_ids[-1]
    assert -case.geometry.block_size <= chunk.last_row <= -1


@given(cases())
@PROPERTY
def test_padding_never_reaches_a_slot_of_anybody_else(case: Case):
    """Before the prompt it is block 0; behind the prompt, the rest of the prompt's last block."""
    chunk, size = case.lay_out(padded=True), case.geometry.block_size
    seen_token = False
    for slot, padding in zip(
        chunk.slot_mapping[0].tolist(), chunk.is_padding[0].tolist(), strict=True
    ):
        seen_token = seen_token or not padding
        if not padding:
            assert slot // size in case.blocks
        elif seen_token:
            assert slot // size == case.blocks[(case.num_tokens - 1) // size]
            assert slot > case.slot(case.num_tokens - 1)
        else:
            assert slot // size == 0


@pytest.mark.parametrize("padded", [False, True])
def test_indices_are_int64(padded: bool):
    case = Case(Geometry(4, 8, 1000), 5, [3, 1], 0, 5)
    chunk = case.lay_out(padded)
    for tensor in (
        chunk.token_ids,
        chunk.position_ids,
        chunk.feature_index,
        chunk.slot_mapping,
        chunk.block_table,
        chunk.current_tkv,
        chunk.left_padding,
    ):
        assert str(tensor.dtype) == "torch.int64"
    assert str(chunk.is_padding.dtype) == "torch.bool"

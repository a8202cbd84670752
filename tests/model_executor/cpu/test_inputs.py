# SPDX-License-Identifier: Apache-2.0
"""Steps on the CPU: the tokens of all sequences in one row, in memory that is used again."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spyre_mm.model_executor.cpu.inputs import CpuDecode, CpuInputs
from vllm_spyre_mm.model_executor.step_inputs import DecodeRows

BLOCK_SIZE, MAX_ROWS, MAX_BLOCKS = 4, 5, 8


def block_rows(seed: int = 0) -> np.ndarray:
    """Distinct blocks for every row."""
    ids = np.random.default_rng(seed).permutation(MAX_ROWS * MAX_BLOCKS).astype(np.int32) + 1
    return ids.reshape(MAX_ROWS, MAX_BLOCKS)


def make_steps(least_tokens: int = 2) -> CpuInputs:
    return CpuInputs(
        max_num_seqs=MAX_ROWS,
        max_blocks=MAX_BLOCKS,
        block_size=BLOCK_SIZE,
        least_tokens=least_tokens,
    )


def decode(steps: CpuInputs, num_computed: list[int], rows: np.ndarray) -> CpuDecode:
    batch = len(num_computed)
    token_ids = [*range(100, 100 + batch)]
    positions = positions_of(num_computed)
    return steps.decode(DecodeRows(token_ids, num_computed, positions, rows[:batch].tolist(), rows))


def positions_of(num_computed: list[int]) -> list[int]:
    """Others than the indices of the tokens, as those behind a picture may be."""
    return [each + 7 * row for row, each in enumerate(num_computed)]


batches = st.lists(st.integers(0, MAX_BLOCKS * BLOCK_SIZE - 1), min_size=1, max_size=MAX_ROWS)


@given(st.lists(batches, min_size=1, max_size=4), st.integers(1, 2), st.sets(st.integers(0, 3)))
@settings(deadline=None, derandomize=True)
def test_a_decode_is_one_token_of_each_request(
    many: list[list[int]], least_tokens: int, after_chunks: set[int]
):
    """Whatever the steps before it were."""
    steps = make_steps(least_tokens)
    for number, num_computed in enumerate(many):
        if number in after_chunks:
            steps.chunk_attention(block_ids=np.array([7, 3, 9]), end=10, length=3)
        rows = block_rows(number // 2)
        step = decode(steps, num_computed, rows)
        batch, missing = len(num_computed), max(0, least_tokens - len(num_computed))
        assert step.token_ids.tolist() == [[*range(100, 100 + batch), *[0] * missing]]
        assert step.position_ids.tolist() == [[*positions_of(num_computed), *[0] * missing]]
        slots = [
            int(rows[row, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
            for row, position in enumerate(num_computed)
        ]
        assert step.attention["slot_mapping"].tolist() == [slots + [0] * missing]
        lengths = step.attention["kv_lengths"].tolist()
        assert lengths[:batch] == [position + 1 for position in num_computed]
        assert not any(lengths[batch:])
        assert set(step.attention["query_lengths"].tolist()) == {1}
        assert step.attention["kv_blocks"].data_ptr() == rows.ctypes.data


def test_the_block_table_is_not_copied():
    rows = block_rows()
    step = decode(make_steps(), [3, 9], rows)
    assert step.attention["kv_blocks"].data_ptr() == rows.ctypes.data


def test_nothing_is_allocated_anew():
    steps = make_steps()
    rows = block_rows()
    first, second = (decode(steps, lengths, rows) for lengths in ([3, 9], [4, 10]))
    assert first.token_ids.data_ptr() == second.token_ids.data_ptr()
    for name, tensor in first.attention.items():
        assert tensor.data_ptr() == second.attention[name].data_ptr()


@pytest.mark.parametrize("length", [1, 6])
def test_a_chunk_attends_to_its_own_prompt(length: int):
    steps = make_steps()
    decode(steps, [3, 9, 4], block_rows())
    attention = steps.chunk_attention(block_ids=np.array([7, 3, 9]), end=10, length=length)
    assert attention["kv_blocks"][0, :3].tolist() == [7, 3, 9]
    assert attention["kv_lengths"].tolist() == [10, 0, 0, 0, 0]
    assert attention["query_lengths"].tolist() == [length, 0, 0, 0, 0]


def test_chunks_and_decodes_have_the_same_shapes_and_strides():
    """Of what the compiled graph takes; else there would be two graphs."""
    steps = make_steps()
    step = decode(steps, [3, 9, 4], block_rows())
    chunk = steps.chunk_attention(block_ids=np.array([7, 3, 9]), end=10, length=3)
    for name, tensor in chunk.items():
        other = step.attention[name]
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (
            other.shape,
            other.stride(),
            other.dtype,
        )
    like_a_chunk = torch.zeros(1, 3, dtype=torch.int64)
    for tensor in (step.token_ids, step.position_ids, step.attention["slot_mapping"]):
        assert tensor.shape == like_a_chunk.shape
        assert tensor.stride() == like_a_chunk.stride()


def test_a_decoder_takes_what_its_positions_are_turned_into():
    steps, rows = make_steps(), block_rows()
    steps.rotate = lambda positions: positions.float()[..., None] / 2
    decodes = DecodeRows([8, 9], [3, 6], [30, 6], rows[:2].tolist(), rows)
    inputs = steps.decode_inputs(decodes, lambda ids: torch.zeros(*ids.shape, 4))
    assert inputs.position_ids.tolist() == [[[15.0], [3.0]]]


def test_one_row_is_enough_for_one_sequence():
    steps = CpuInputs(max_num_seqs=1, max_blocks=2, block_size=BLOCK_SIZE, least_tokens=2)
    step = decode(steps, [5], block_rows()[:1, :2].copy())
    assert step.token_ids.tolist() == [[100, 0]]
    assert step.attention["kv_lengths"].tolist() == [6, 0]

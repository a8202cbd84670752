# SPDX-License-Identifier: Apache-2.0
"""The geometry's arithmetic holds for every prompt, chunk and block size."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spyre_mm.scheduler.geometry import Geometry

PROPERTY = settings(deadline=None, derandomize=True, max_examples=300)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Blocks of a few tokens (so that every alignment occurs) or of Spyre's 64."""
    block_size = draw(st.sampled_from([1, 2, 3, 4, 8, 64]))
    blocks_in_chunk = draw(st.integers(1, 9))
    blocks_in_batch = draw(st.integers(1, 60))
    return Geometry(
        block_size=block_size,
        chunk_size=block_size * blocks_in_chunk,
        max_batch_tkv=block_size * blocks_in_batch,
    )


@st.composite
def prompts(draw: st.DrawFn) -> tuple[Geometry, int]:
    """A geometry and the length of a prompt of up to five chunks."""
    geometry = draw(geometries())
    return geometry, draw(st.integers(1, 5 * geometry.chunk_size + 1))


def chunk_bounds(geometry: Geometry, num_tokens: int, start: int) -> list[int]:
    """Boundaries of the chunks from ``start`` on, both ends included."""
    bounds = [start]
    while bounds[-1] < num_tokens:
        end = geometry.chunk_end(num_tokens, bounds[-1])
        assert end > bounds[-1], "a chunk computes at least one token"
        bounds.append(end)
    return bounds


@given(prompts())
@PROPERTY
def test_num_blocks_is_the_fewest_that_hold_the_tokens(prompt: tuple[Geometry, int]):
    geometry, num_tokens = prompt
    blocks = geometry.num_blocks(num_tokens)
    assert (blocks - 1) * geometry.block_size < num_tokens <= blocks * geometry.block_size


@given(prompts())
@PROPERTY
def test_left_padding_is_the_least_that_makes_the_prompt_whole_chunks(prompt: tuple[Geometry, int]):
    geometry, num_tokens = prompt
    padding = geometry.left_padding(num_tokens)
    padded = padding + geometry.num_blocks(num_tokens) * geometry.block_size
    assert padding % geometry.block_size == 0
    assert 0 <= padding < geometry.chunk_size
    assert padded % geometry.chunk_size == 0
    assert geometry.padded_length(num_tokens) == padded


@given(prompts())
@PROPERTY
def test_chunks_tile_a_prompt_on_the_padded_grid(prompt: tuple[Geometry, int]):
    """Nothing is left out or computed twice, and no chunk is longer than the chunk size."""
    geometry, num_tokens = prompt
    padding = geometry.left_padding(num_tokens)
    bounds = chunk_bounds(geometry, num_tokens, 0)
    assert bounds[-1] == num_tokens
    for bound in bounds[1:-1]:
        assert (bound + padding) % geometry.chunk_size == 0
        assert bound % geometry.block_size == 0
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    assert max(lengths) <= geometry.chunk_size
    assert all(length == geometry.chunk_size for length in lengths[1:-1])


@given(prompts(), st.data())
@PROPERTY
def test_all_tokens_of_a_chunk_agree_on_its_end(prompt: tuple[Geometry, int], data: st.DataObject):
    geometry, num_tokens = prompt
    token = data.draw(st.integers(0, num_tokens - 1))
    bounds = chunk_bounds(geometry, num_tokens, 0)
    expected = next(bound for bound in bounds if bound > token)
    assert geometry.chunk_end(num_tokens, token) == expected


@given(prompts(), st.data())
@PROPERTY
def test_a_hit_is_rounded_down_to_the_largest_chunk_start_it_covers(
    prompt: tuple[Geometry, int], data: st.DataObject
):
    geometry, num_tokens = prompt
    num_cached = data.draw(st.integers(0, num_tokens + geometry.block_size))
    start = geometry.prefill_start(num_tokens, num_cached)
    bounds = chunk_bounds(geometry, num_tokens, 0)
    # The last bound is the prompt's end: starting there would leave no token to compute.
    assert start == max(bound for bound in bounds[:-1] if bound <= num_cached)
    assert start < num_tokens


@given(prompts(), st.data())
@PROPERTY
def test_prefill_after_a_hit_walks_the_same_grid_to_the_end(
    prompt: tuple[Geometry, int], data: st.DataObject
):
    geometry, num_tokens = prompt
    num_cached = data.draw(st.integers(0, num_tokens))
    start = geometry.prefill_start(num_tokens, num_cached)
    rest = chunk_bounds(geometry, num_tokens, start)
    assert rest[-1] == num_tokens
    assert set(rest) <= set(chunk_bounds(geometry, num_tokens, 0))


def test_a_prompt_that_is_cached_whole_still_computes_its_last_chunk():
    geometry = Geometry(block_size=64, chunk_size=128, max_batch_tkv=1024)
    assert geometry.prefill_start(256, 256) == 128
    assert geometry.prefill_start(128, 128) == 0


@given(prompts(), st.data())
@PROPERTY
def test_without_whole_chunks_a_prefill_starts_at_the_last_cached_block(
    prompt: tuple[Geometry, int], data: st.DataObject
):
    """And goes on on the grid."""
    geometry, num_tokens = prompt
    geometry = dataclasses.replace(geometry, whole_chunks=False)
    num_cached = data.draw(st.integers(0, num_tokens + geometry.block_size))
    start = geometry.prefill_start(num_tokens, num_cached)
    assert start % geometry.block_size == 0
    assert start <= num_cached
    assert start < num_tokens
    assert start + geometry.block_size > min(num_cached, num_tokens - 1)
    rest = chunk_bounds(geometry, num_tokens, start)
    assert rest[-1] == num_tokens
    assert set(rest[1:]) <= set(chunk_bounds(geometry, num_tokens, 0))


def cost(geometry: Geometry, lengths: list[int]) -> int:
    """Batch × padded length, as the bound counts it."""
    longest = max(-(-length // geometry.block_size) for length in lengths)
    return len(lengths) * longest * geometry.block_size


@given(geometries(), st.data())
@PROPERTY
def test_decode_rows_respect_the_bound_and_no_skipped_row_would_have_fitted(
    geometry: Geometry, data: st.DataObject
):
    """Greedy from the oldest on: a row is skipped only if it does not fit beside those before."""
    longest = geometry.max_batch_tkv // geometry.block_size * geometry.block_size
    lengths = data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=12))
    rows = geometry.decode_rows_that_fit(lengths)
    assert rows[0] == 0
    assert rows == sorted(set(rows))
    assert cost(geometry, [lengths[row] for row in rows]) <= geometry.max_batch_tkv
    for skipped in set(range(len(lengths))) - set(rows):
        before = [lengths[row] for row in rows if row < skipped]
        assert cost(geometry, [*before, lengths[skipped]]) > geometry.max_batch_tkv


def test_the_oldest_row_decodes_even_beyond_the_bound():
    geometry = Geometry(block_size=64, chunk_size=64, max_batch_tkv=64)
    assert geometry.decode_rows_that_fit([100, 10]) == [0]


def test_a_long_row_is_skipped_but_a_later_short_one_is_not():
    geometry = Geometry(block_size=64, chunk_size=64, max_batch_tkv=256)
    assert geometry.decode_rows_that_fit([64, 192, 60, 64]) == [0, 2, 3]


def test_no_rows_need_no_room():
    geometry = Geometry(block_size=64, chunk_size=64, max_batch_tkv=64)
    assert geometry.decode_rows_that_fit([]) == []


@pytest.mark.parametrize("chunk_size", [0, -64, 1, 63, 65, 500])
def test_a_chunk_of_other_than_whole_blocks_is_refused(chunk_size: int):
    with pytest.raises(ValueError, match="chunk size must be a multiple of 64") as error:
        Geometry(block_size=64, chunk_size=chunk_size, max_batch_tkv=1024)
    assert str(chunk_size) in str(error.value)
    assert "--max-num-batched-tokens" in str(error.value)


@pytest.mark.parametrize(
    ("max_model_len", "chunk_size", "expected"),
    [
        (8192, 512, 8192),
        (8193, 512, 16384),
        (3072, 1024, 3072),
        (2049, 512, 3072),
        (2048, 512, 2048),
        (3073, 1024, 4096),
        (3000, 1536, 3072),
        (192, 512, 512),
        (576, 128, 1024),
        (512, 192, 3072),
    ],
)
def test_a_cards_context_is_the_least_that_has_programs(
    max_model_len: int, chunk_size: int, expected: int
):
    assert Geometry(64, chunk_size, 1 << 20).context_len(max_model_len) == expected
    on_cpu = Geometry(64, chunk_size, 1 << 20, whole_chunks=False).context_len(max_model_len)
    assert on_cpu == -(-max_model_len // chunk_size) * chunk_size


@pytest.mark.parametrize(("max_model_len", "chunk_size"), [(8192, 1536), (3072, 640)])
def test_a_context_without_programs_is_refused(max_model_len: int, chunk_size: int):
    message = f"none of {max_model_len} tokens or more has whole chunks of {chunk_size}"
    geometry = Geometry(64, chunk_size, 1 << 20)
    with pytest.raises(ValueError, match=message):
        geometry.context_len(max_model_len)

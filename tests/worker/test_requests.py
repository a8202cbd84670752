# SPDX-License-Identifier: Apache-2.0
"""What the worker remembers of requests follows the scheduler's messages."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.scheduler.outputs import SpyreModelRunnerOutput
from vllm_spyre_mm.worker.requests import RequestTable, WorkerRequest

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)


def new_request(req_id: str = "a", **changes: Any) -> NewRequestData:
    values = {
        "req_id": req_id,
        "prompt_token_ids": [10, 11, 12, 13],
        "mm_features": [],
        "sampling_params": SamplingParams(temperature=0.0),
        "pooling_params": None,
        "block_ids": ([1, 2],),
        "num_computed_tokens": 0,
        "lora_request": None,
        **changes,
    }
    return NewRequestData(**values)


def state_of(**changes: Any) -> WorkerRequest:
    """What the worker remembers of such a request."""
    return WorkerRequest.from_new(new_request(**changes), SpyreSettings())


def one_axis(token_ids: list[int], mm_features: Any) -> None:
    """A model's positions that are the indices of the tokens."""


def cached(
    num_computed: dict[str, int],
    new_blocks: dict[str, list[int]] | None = None,
    resumed: tuple[str, ...] = (),
) -> CachedRequestData:
    """The scheduler's message on requests that it has sent before."""
    data = CachedRequestData.make_empty()
    data.req_ids = list(num_computed)
    data.num_computed_tokens = list(num_computed.values())
    data.new_block_ids = [
        (new_blocks[req_id],) if new_blocks and req_id in new_blocks else None
        for req_id in num_computed
    ]
    data.num_output_tokens = [0] * len(num_computed)
    data.resumed_req_ids = set(resumed)
    return data


# -- a request -------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=8),
    st.lists(st.integers(100, 199), max_size=6),
    st.data(),
)
@PROPERTY
def test_token_ids_run_on_from_the_prompt_into_the_output(
    prompt: list[int], output: list[int], data: st.DataObject
):
    state = state_of(prompt_token_ids=prompt)
    state.output_token_ids.extend(output)
    start = data.draw(st.integers(0, len(prompt) + len(output)))
    end = data.draw(st.integers(start, len(prompt) + len(output)))
    assert state.token_ids(start, end) == (prompt + output)[start:end]
    assert state.num_tokens == len(prompt + output)


def test_a_new_request_has_nothing_computed_and_collects_nothing_yet():
    features: list[Any] = [object()]
    state = state_of(mm_features=features, num_computed_tokens=64)
    assert state.req_id == "a"
    assert state.blocks == [1, 2]
    assert state.mm_features is features
    assert state.num_computed_tokens == 64, "a prefix-cache hit"
    assert state.output_token_ids == []
    assert not state.prefilled
    assert (state.mm_parts, state.mm_embedding) == ([], None)


def test_requests_share_no_lists():
    one, other = (state_of(req_id=req_id) for req_id in "ab")
    one.mm_parts.append(torch.zeros(1, 1))
    one.output_token_ids.append(3)
    assert other.mm_parts == []
    assert other.output_token_ids == []


def drawn(params: SamplingParams) -> list[float] | None:
    generator = state_of(sampling_params=params).generator
    return None if generator is None else torch.rand(4, generator=generator).tolist()


def test_a_seed_makes_a_generator_of_the_requests_own():
    seeded = drawn(SamplingParams(temperature=1.0, seed=7))
    assert seeded is not None
    assert seeded == drawn(SamplingParams(temperature=1.0, seed=7))
    assert seeded != drawn(SamplingParams(temperature=1.0, seed=8))
    assert seeded == torch.rand(4, generator=torch.Generator().manual_seed(7)).tolist()


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=1.0), SamplingParams(temperature=0.0, seed=7)]
)
def test_without_a_seed_or_at_random_there_is_no_generator(params: SamplingParams):
    assert drawn(params) is None


# -- positions on three axes -----------------------------------------------------------------------


def with_axes(token_ids: list[int], mm_features: Any) -> tuple[torch.Tensor, int]:
    """A prompt of four with two tokens that are side by side."""
    assert token_ids == [10, 11, 12, 13]
    assert len(mm_features) == 1
    return torch.tensor([[0, 1, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2]]), -1


@pytest.fixture
def with_picture() -> WorkerRequest:
    table = RequestTable(SpyreSettings(), with_axes)
    table.add([new_request("a", mm_features=[object()])])
    return table["a"]


def test_positions_of_a_prompt_run_on_behind_it(with_picture: WorkerRequest):
    """As after a preemption, when generated tokens are prefilled."""
    with_picture.output_token_ids.extend([20, 21])
    expected = [[0, 1, 1, 2, 3, 4], [0, 1, 1, 2, 3, 4], [0, 1, 2, 2, 3, 4]]
    for start in range(6):
        for end in range(start + 1, 7):
            positions: Any = with_picture.positions(start, end)
            assert str(positions.dtype) == "int64"
            assert positions.tolist() == [axis[start:end] for axis in expected]


def test_a_decode_is_at_its_index_and_the_distance(with_picture: WorkerRequest):
    with_picture.num_computed_tokens = 4
    assert with_picture.next_position == 3


@pytest.mark.parametrize(
    ("find", "features"), [(one_axis, [object()]), (with_axes, [])], ids=["model", "text"]
)
def test_positions_of_one_axis_are_the_indices(find: Any, features: list[Any]):
    """A model has no others, or a prompt has no pictures."""
    table = RequestTable(SpyreSettings(), find)
    table.add([new_request("a", mm_features=features, num_computed_tokens=3)])
    assert table["a"].positions(0, 4) is None
    assert table["a"].next_position == 3


# -- the table -------------------------------------------------------------------------------------


@pytest.fixture
def table() -> RequestTable:
    table = RequestTable(SpyreSettings(), one_axis)
    table.add([new_request("a"), new_request("b", block_ids=([7],))])
    return table


def test_requests_are_known_from_their_first_message_to_their_end(table: RequestTable):
    assert len(table) == 2
    assert table["b"].blocks == [7]
    table.remove(["b", "never seen"])
    assert len(table) == 1
    with pytest.raises(KeyError):
        table["b"]
    table.add([new_request("b", block_ids=([9],))])
    assert table["b"].blocks == [9], "an id may come back"


def test_progress_and_new_blocks_are_taken_over(table: RequestTable):
    table.update(cached({"a": 4, "b": 64}, {"a": [3, 4]}))
    assert (table["a"].num_computed_tokens, table["b"].num_computed_tokens) == (4, 64)
    assert table["a"].blocks == [1, 2, 3, 4]
    assert table["b"].blocks == [7]
    table.update(cached({"b": 65}, {"b": [8]}))
    assert table["b"].blocks == [7, 8]
    assert table["a"].num_computed_tokens == 4, "who is not in the message stays as it was"


def test_going_on_keeps_what_was_collected(table: RequestTable):
    state, part = table["a"], torch.ones(2, 3)
    state.mm_parts.append(part)
    state.prefilled = True
    table.update(cached({"a": 4}, {"a": [5]}))
    assert state.prefilled
    assert state.mm_parts == [part]


def test_resuming_starts_the_prefill_again_in_new_blocks(table: RequestTable):
    """A preempted request lost its blocks; its generated tokens are part of what is prefilled."""
    state = table["a"]
    state.output_token_ids.extend([20, 21])
    state.prefilled = True
    state.mm_parts.append(torch.ones(2, 3))
    table.update(cached({"a": 0}, {"a": [30, 31]}, resumed=("a",)))
    assert table["a"] is state
    assert state.blocks == [30, 31]
    assert state.num_computed_tokens == 0
    assert not state.prefilled
    assert state.mm_parts == []
    assert state.token_ids(0, 6) == [10, 11, 12, 13, 20, 21]


def test_resuming_keeps_the_generator_where_it_was():
    """The answer of a seeded request does not depend on whether it was preempted."""
    params = SamplingParams(temperature=1.0, seed=7)
    table = RequestTable(SpyreSettings(), one_axis)
    table.add([new_request("a", sampling_params=params), new_request("b", sampling_params=params)])
    for req_id in "ab":
        torch.rand(3, generator=table[req_id].generator)
    table.update(cached({"a": 0}, {"a": [5]}, resumed=("a",)))
    draws = [torch.rand(2, generator=table[req_id].generator) for req_id in "ab"]
    assert torch.equal(*draws)


def test_resuming_without_blocks_is_impossible(table: RequestTable):
    with pytest.raises(AssertionError, match="allocated anew"):
        table.update(cached({"a": 0}, resumed=("a",)))


def test_a_steps_output_has_no_embeddings_unless_they_are_given():
    one = SpyreModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    other = SpyreModelRunnerOutput(req_ids=["b"], req_id_to_index={"b": 0})
    one.mm_embeddings["a"] = torch.zeros(1, 1)
    assert other.mm_embeddings == {}


def test_an_encoder_alone_has_no_blocks() -> None:
    assert state_of(block_ids=()).blocks == []

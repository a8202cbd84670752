# SPDX-License-Identifier: Apache-2.0
"""The CPU's paged attention reads a request's own tokens, and nothing else."""

import fms.utils.spyre.paged  # noqa: F401 - registers the reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.model_executor.cpu.attention_steps import (
    CPU_ALGORITHMS,
    PROPERTY,
    TOLERANCE,
    Shape,
    Step,
    assert_close,
    make_step,
    steps,
)
from tests.tiers import on_distinct_tiers
from vllm_spyre_mm.model_executor.cpu.attention import (
    CPU_ATTENTION,
    CPU_COMPILED_ATTENTION,
    register_cpu_attention,
)


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register_cpu_attention()


@pytest.mark.parametrize("algorithm", [CPU_ATTENTION, CPU_COMPILED_ATTENTION])
@pytest.mark.parametrize("head_dim", [16, 40])
def test_a_row_of_padding_yields_zeros(algorithm: str, head_dim: int):
    """And none of its blocks is looked at, which need not be there; also for heads that the
    kernel does not take."""
    step = make_step(Shape(lengths=[9, 5], head_dim=head_dim))
    expected, *_ = step.run(algorithm)
    kwargs = step.cpu_kwargs()
    kwargs["kv_lengths"][1] = 0
    kwargs["kv_blocks"] = kwargs["kv_blocks"][:1].clone()
    attended, *_ = step.run(algorithm, **kwargs)
    assert_close(attended[0], expected[0])
    assert not attended[1].any()


@pytest.mark.parametrize("algorithm", [CPU_ATTENTION, CPU_COMPILED_ATTENTION])
def test_rows_of_a_decode_do_not_depend_on_their_neighbours(algorithm: str):
    together = make_step(Shape(lengths=[3, 29, 12, 1]))
    attended, *_ = together.run(algorithm)
    for row in range(4):
        kwargs = {name: tensor[row : row + 1] for name, tensor in together.kwargs.items()}
        alone = Step(
            shape=together.shape,
            query=together.query[row : row + 1],
            keys=together.keys[row : row + 1],
            values=together.values[row : row + 1],
            caches=together.caches,
            kwargs=kwargs,
            own=together.own[row : row + 1],
        )
        assert_close(alone.run(algorithm)[0][0], attended[row])


@given(CPU_ALGORITHMS, steps, st.sampled_from(list(TOLERANCE)))
@PROPERTY
def test_nothing_but_a_requests_own_tokens_is_read(
    algorithm: str, shape: Shape, dtype: torch.dtype
):
    """NaN in block 0, in all blocks of others and beyond the end in the last block."""
    assert_reads_its_own(algorithm, make_step(shape, dtype))


@on_distinct_tiers
@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("lengths", [[70, 33, 1], [257, 64, 500]])
def test_nothing_but_a_requests_own_tokens_is_read_in_whole_registers(lengths: list[int]):
    """Of shapes that a matrix unit takes, some tokens at a time."""
    shape = Shape(lengths=lengths, block_size=64, head_dim=64)
    assert_reads_its_own(CPU_COMPILED_ATTENTION, make_step(shape, torch.bfloat16))


def assert_reads_its_own(algorithm: str, step: Step) -> None:
    """The result is the same when all that is not a sequence's own is NaN."""
    expected, *_ = step.run(algorithm)
    foreign = torch.ones(len(step.caches[0].flatten(0, 1)), dtype=torch.bool)
    foreign[[slot for slots in step.own for slot in slots]] = False
    assert foreign[: step.shape.block_size].all(), "block 0 is nobody's"
    for cache in step.caches:
        cache.flatten(0, 1)[foreign] = torch.nan
    attended, *_ = step.run(algorithm)
    assert torch.equal(attended, expected)


@given(steps)
@PROPERTY
def test_the_blocks_of_a_sequence_are_its_own_from_the_left(shape: Shape):
    step = make_step(shape)
    kwargs = step.cpu_kwargs()
    assert kwargs["kv_lengths"].tolist() == shape.lengths
    assert kwargs["query_lengths"].tolist() == [shape.query_length] * len(shape.lengths)
    size = shape.block_size
    for blocks, own in zip(kwargs["kv_blocks"].tolist(), step.own, strict=True):
        assert own == [blocks[i // size] * size + i % size for i in range(len(own))]

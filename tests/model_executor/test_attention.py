# SPDX-License-Identifier: Apache-2.0
"""The CPU's paged attention computes what FMS's reference does, and reads nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fms.utils.spyre.paged  # noqa: F401 - registers the reference
import pytest
import torch
from fms.modules.attention import get_attention_type
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from vllm_spyre_mm.model_executor.attention import (
    CARD_ATTENTION,
    CPU_ATTENTION,
    cpu_attention_kwargs,
    register_cpu_attention,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
HEAD_DIM = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
EXTRA_BLOCKS = 3
"""Blocks of other requests in every cache, block 0 besides."""


@dataclass(frozen=True)
class Shape:
    """What a step looks like, without its numbers.

    Attributes:
        lengths: tokens of each sequence after the step.
        query_length: tokens of each that the step computes.
        padding_blocks: whole blocks of padding before the longest sequence.
        block_size: tokens in a block.
        kv_heads: KV heads.
        group: query heads that share a KV head.
        seed: of the numbers and of the order of the blocks.
    """

    lengths: list[int]
    query_length: int = 1
    padding_blocks: int = 0
    block_size: int = 4
    kv_heads: int = 2
    group: int = 2
    seed: int = 0


@dataclass
class Step:
    """One call of an attention layer, with a cache full of random numbers.

    ``own`` are the cache rows that hold each sequence's tokens, in order.
    """

    shape: Shape
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    caches: tuple[torch.Tensor, torch.Tensor]
    kwargs: dict[str, torch.Tensor]
    own: list[list[int]]

    def run(self, attn_name: str, **more: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Store and attend on copies of the caches: attended values, and both caches."""
        algorithm = get_attention_type(attn_name=attn_name)
        kwargs = {**self.kwargs, **more}
        scale = kwargs.pop("scale", None)
        caches = (cache.clone() for cache in self.caches)
        keys, values, key_cache, value_cache = algorithm["store"](
            self.keys, self.values, *caches, **kwargs
        )
        attended = algorithm["compute_decode"](
            query=self.query,
            key_cache=keys,
            value_cache=values,
            nheads=self.query.shape[2],
            kvheads=self.keys.shape[2],
            p_dropout=0.0,
            scale_factor=scale,
            **kwargs,
        )
        return attended, key_cache, value_cache

    def cpu_kwargs(self) -> dict[str, torch.Tensor]:
        return cpu_attention_kwargs(
            self.kwargs["block_table"],
            self.kwargs["current_tkv_mask"],
            self.kwargs["left_padded_prompt_mask"],
            self.shape.query_length,
            self.shape.block_size,
        )


def make_step(shape: Shape, dtype: torch.dtype = torch.float32) -> Step:
    """Blocks in random order, sequences padded on the left with block 0 to one width."""
    generator = torch.Generator().manual_seed(shape.seed)
    size, batch = shape.block_size, len(shape.lengths)
    counts = [-(-length // size) for length in shape.lengths]
    width = max(counts) + shape.padding_blocks
    num_blocks = 1 + sum(counts) + EXTRA_BLOCKS
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    tables, own = [], []
    for length, count in zip(shape.lengths, counts, strict=True):
        blocks = [free.pop() for _ in range(count)]
        tables.append([0] * (width - count) + blocks)
        own.append([blocks[i // size] * size + i % size for i in range(length)])
    padding = torch.tensor([(width - count) * size for count in counts])

    def random(*dims: int) -> torch.Tensor:
        return torch.randn(dims, generator=generator).to(dtype)

    new = (batch, shape.query_length)
    cache = (num_blocks, size, shape.kv_heads, HEAD_DIM)
    return Step(
        shape=shape,
        query=random(*new, shape.kv_heads * shape.group, HEAD_DIM),
        keys=random(*new, shape.kv_heads, HEAD_DIM),
        values=random(*new, shape.kv_heads, HEAD_DIM),
        caches=(random(*cache), random(*cache)),
        kwargs={
            "slot_mapping": torch.tensor([slots[-shape.query_length :] for slots in own]),
            "block_table": torch.tensor(tables),
            "current_tkv_mask": padding + torch.tensor(shape.lengths),
            "left_padded_prompt_mask": padding,
        },
        own=own,
    )


heads = {
    "padding_blocks": st.integers(0, 2),
    "block_size": st.sampled_from([4, 8]),
    "kv_heads": st.integers(1, 3),
    "group": st.sampled_from([1, 2, 4]),
    "seed": st.integers(0, 10_000),
}
decodes = st.builds(
    Shape,
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    query_length=st.just(1),
    **heads,
)


@st.composite
def prefills(draw: st.DrawFn) -> Shape:
    """One chunk of one prompt without padding, after a context of whole blocks."""
    values = {name: draw(strategy) for name, strategy in heads.items()}
    context = draw(st.integers(0, 4)) * values["block_size"]
    chunk = draw(st.integers(1, 20))
    return Shape(lengths=[context + chunk], query_length=chunk, **values)


steps = decodes | prefills()


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register_cpu_attention()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# -- against the reference -----------------------------------------------------------------------


@given(steps, st.sampled_from(list(TOLERANCE)), st.sampled_from([None, 0.3]))
@PROPERTY
def test_a_step_is_what_fms_computes(shape: Shape, dtype: torch.dtype, scale: float | None):
    step = make_step(shape, dtype)
    attended, *caches = step.run(CPU_ATTENTION, scale=scale)
    expected, *expected_caches = step.run(CARD_ATTENTION, scale=scale)
    assert attended.dtype == dtype
    assert attended.is_contiguous()
    assert_close(attended, expected)
    assert all(torch.equal(*pair) for pair in zip(caches, expected_caches, strict=True))


@given(steps)
@PROPERTY
def test_what_is_derived_once_a_step_is_what_each_layer_would_derive(shape: Shape):
    step = make_step(shape)
    derived = step.run(CPU_ATTENTION, **step.cpu_kwargs())
    assert all(torch.equal(*pair) for pair in zip(derived, step.run(CPU_ATTENTION), strict=True))


def test_rows_of_a_decode_do_not_depend_on_their_neighbours():
    together = make_step(Shape(lengths=[3, 29, 12, 1]))
    attended, *_ = together.run(CPU_ATTENTION)
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
        assert_close(alone.run(CPU_ATTENTION)[0][0], attended[row])


# -- the store -------------------------------------------------------------------------------------


@given(steps)
@PROPERTY
def test_a_store_writes_its_slots_in_place_and_nothing_else(shape: Shape):
    step = make_step(shape)
    before = [cache.clone() for cache in step.caches]
    store = get_attention_type(attn_name=CPU_ATTENTION)["store"]
    returned = store(step.keys, step.values, *step.caches, **step.kwargs)
    for cache, result in zip(step.caches * 2, returned, strict=True):
        assert result is cache
    slots = step.kwargs["slot_mapping"].flatten()
    for cache, old, new in zip(step.caches, before, (step.keys, step.values), strict=True):
        expected = old.flatten(0, 1)
        expected[slots] = new.flatten(0, 1)
        assert torch.equal(cache.flatten(0, 1), expected)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_store_without_a_cache_is_refused(missing: int):
    step = make_step(Shape(lengths=[5]))
    caches = [None if i == missing else cache for i, cache in enumerate(step.caches)]
    with pytest.raises(AssertionError, match="needs a cache"):
        get_attention_type(attn_name=CPU_ATTENTION)["store"](
            step.keys, step.values, *caches, **step.kwargs
        )


# -- what is read ----------------------------------------------------------------------------------


@given(steps, st.sampled_from(list(TOLERANCE)))
@PROPERTY
def test_nothing_but_a_requests_own_tokens_is_read(shape: Shape, dtype: torch.dtype):
    """NaN in block 0, in all blocks of others and beyond the end in the last block."""
    step = make_step(shape, dtype)
    expected, *_ = step.run(CPU_ATTENTION)
    foreign = torch.ones(len(step.caches[0].flatten(0, 1)), dtype=torch.bool)
    foreign[[slot for slots in step.own for slot in slots]] = False
    assert foreign[: shape.block_size].all(), "block 0 is nobody's"
    for cache in step.caches:
        cache.flatten(0, 1)[foreign] = torch.nan
    attended, *_ = step.run(CPU_ATTENTION)
    assert torch.equal(attended, expected)


@given(steps)
@PROPERTY
def test_the_cache_rows_of_a_sequence_are_its_own_in_order(shape: Shape):
    step = make_step(shape)
    kwargs = step.cpu_kwargs()
    longest = max(*shape.lengths, 2)
    for slots, own in zip(kwargs["kv_slots"].tolist(), step.own, strict=True):
        assert len(slots) == longest
        assert slots == own + own[-1:] * (longest - len(own))


@given(steps)
@PROPERTY
def test_a_query_sees_the_keys_up_to_its_own_position(shape: Shape):
    mask = make_step(shape).cpu_kwargs()["kv_mask"]
    assert mask.dtype == torch.bool
    for row, length in zip(mask, shape.lengths, strict=True):
        for i, seen in enumerate(row.tolist()):
            position = length - shape.query_length + i
            assert seen == [key <= position for key in range(len(seen))]


# -- the compiler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [Shape(lengths=[5, 9]), Shape(lengths=[11], query_length=3)])
def test_the_operators_are_what_their_schemas_say(shape: Shape):
    step = make_step(shape)
    kwargs = step.cpu_kwargs()
    torch.library.opcheck(
        torch.ops.spyre_mm.paged_store.default,
        (step.keys, step.values, *step.caches, step.kwargs["slot_mapping"]),
    )
    torch.library.opcheck(
        torch.ops.spyre_mm.paged_attention.default,
        (step.query, *step.caches, kwargs["kv_slots"], kwargs["kv_mask"], 0.25),
    )


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No graphs of other tests, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "shapes",
    [
        [
            Shape(lengths=[5, 9, 3]),
            Shape(lengths=[2, 2]),
            Shape(lengths=[1, 1]),
            Shape(lengths=[1, 30, 17, 3, 8]),
        ],
        [
            Shape(lengths=[23], query_length=7),
            Shape(lengths=[7], query_length=7),
            Shape(lengths=[2], query_length=2),
            Shape(lengths=[28], query_length=20),
            Shape(lengths=[18], query_length=2, padding_blocks=1),
        ],
    ],
    ids=["decode", "prefill"],
)
def test_one_graph_serves_every_length(shapes: list[Shape]):
    """As the runner calls it: what is derived from the block table comes from outside.

    No two dimensions of the first shapes are equal by chance: the compiler would rely on it.
    """
    algorithm = get_attention_type(attn_name=CPU_ATTENTION)

    def layer(step: dict[str, torch.Tensor], **kwargs: torch.Tensor) -> torch.Tensor:
        keys, values, _, _ = algorithm["store"](
            step["keys"] * 2, step["values"], step["key_cache"], step["value_cache"], **kwargs
        )
        return algorithm["compute_prefill"](
            step["query"], keys, values, 4, 2, 0.0, 0.25, **kwargs
        ).flatten(2)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for shape in shapes:
        step = make_step(shape)
        kwargs = {**step.kwargs, **step.cpu_kwargs()}
        results = []
        for run in (layer, compiled):
            inputs = {"query": step.query, "keys": step.keys, "values": step.values}
            caches = dict(
                zip(("key_cache", "value_cache"), (c.clone() for c in step.caches), strict=True)
            )
            results.append((run({**inputs, **caches}, **kwargs), *caches.values()))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert counter.frame_count == 1


def test_registering_twice_is_harmless():
    register_cpu_attention()
    register_cpu_attention()
    assert get_attention_type(attn_name=CPU_ATTENTION)["is_prefill"]()

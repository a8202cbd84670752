# SPDX-License-Identifier: Apache-2.0
"""The CPU's paged attention computes what FMS's reference does, and reads nothing else."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import fms.utils.spyre.paged  # noqa: F401 - registers the reference
import pytest
import torch
import torch.nn.functional as F
from fms.modules.attention import get_attention_type
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tiers import on_distinct_tiers
from vllm_spyre_mm.model_executor.card.backend import CARD_ATTENTION
from vllm_spyre_mm.model_executor.cpu.attention import (
    CPU_ATTENTION,
    CPU_COMPILED_ATTENTION,
    cpu_attention_kwargs,
    register_cpu_attention,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
CPU_ALGORITHMS = st.sampled_from([CPU_ATTENTION, CPU_COMPILED_ATTENTION])
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
        head_dim: width of a head.
        seed: of the numbers and of the order of the blocks.
    """

    lengths: list[int]
    query_length: int = 1
    padding_blocks: int = 0
    block_size: int = 4
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
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
    cache = (num_blocks, size, shape.kv_heads, shape.head_dim)
    return Step(
        shape=shape,
        query=random(*new, shape.kv_heads * shape.group, shape.head_dim),
        keys=random(*new, shape.kv_heads, shape.head_dim),
        values=random(*new, shape.kv_heads, shape.head_dim),
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


@given(CPU_ALGORITHMS, steps, st.sampled_from(list(TOLERANCE)), st.sampled_from([None, 0.3]))
@PROPERTY
def test_a_step_is_what_fms_computes(
    algorithm: str, shape: Shape, dtype: torch.dtype, scale: float | None
):
    step = make_step(shape, dtype)
    attended, *caches = step.run(algorithm, scale=scale)
    expected, *expected_caches = step.run(CARD_ATTENTION, scale=scale)
    assert attended.dtype == dtype
    assert attended.is_contiguous()
    assert_close(attended, expected)
    assert all(torch.equal(*pair) for pair in zip(caches, expected_caches, strict=True))


@given(CPU_ALGORITHMS, steps)
@PROPERTY
def test_what_is_derived_once_a_step_is_what_each_layer_would_derive(algorithm: str, shape: Shape):
    step = make_step(shape)
    derived = step.run(algorithm, **step.cpu_kwargs())
    assert all(torch.equal(*pair) for pair in zip(derived, step.run(algorithm), strict=True))


@given(CPU_ALGORITHMS, steps)
@PROPERTY
def test_the_queries_of_a_step_may_lie_in_one_row(algorithm: str, shape: Shape):
    step = make_step(shape)
    expected, *caches = step.run(algorithm)
    kwargs = {**step.cpu_kwargs(), "slot_mapping": step.kwargs["slot_mapping"].view(1, -1)}
    flat = dataclasses.replace(
        step,
        query=step.query.flatten(0, 1)[None],
        keys=step.keys.flatten(0, 1)[None],
        values=step.values.flatten(0, 1)[None],
        kwargs=kwargs,
    )
    attended, *flat_caches = flat.run(algorithm)
    assert torch.equal(attended[0], expected.flatten(0, 1))
    assert all(torch.equal(*pair) for pair in zip(flat_caches, caches, strict=True))


@on_distinct_tiers
@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"),
    [(1, 8, 64), (2, 4, 128), (2, 3, 96), (1, 20, 64), (4, 1, 72)],
)
@pytest.mark.parametrize("query_length", [1, 70])
def test_real_shapes(
    dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, query_length: int
):
    """Long enough for several spans of the kernel and for several blocks of PyTorch's."""
    lengths = [700, 1, 256, 65] if query_length == 1 else [700]
    shape = Shape(
        lengths=lengths,
        query_length=query_length,
        block_size=64,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
    )
    step = make_step(shape, dtype)
    expected = exact(step)
    for algorithm in (CPU_ATTENTION, CPU_COMPILED_ATTENTION):
        attended, *_ = step.run(algorithm)
        assert_close(attended, expected.to(dtype))


def exact(step: Step) -> torch.Tensor:
    """Attention in float64, one query at a time."""
    rows = []
    for row, own in enumerate(step.own):
        _, *caches = step.run(CPU_ATTENTION)
        keys, values = (
            cache.flatten(0, 1)[own].double().repeat_interleave(step.shape.group, 1)
            for cache in caches
        )
        scores = torch.einsum("qhd,khd->hqk", step.query[row].double(), keys)
        scores *= step.query.shape[-1] ** -0.5
        ends = len(own) - step.shape.query_length + torch.arange(step.shape.query_length)
        scores.masked_fill_(torch.arange(len(own)) > ends[:, None], -torch.inf)
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.stack(rows)


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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 7, 90])
def test_a_store_takes_parts_of_a_row(dtype: torch.dtype, tokens: int):
    """Keys and values lie beside the queries, as a fused projection leaves them."""
    heads, width, num_slots = 2, 8, 128
    row = torch.randn(1, tokens, 5 * width * heads).to(dtype)
    keys, values = (row[..., i * 16 :][..., :16].view(1, tokens, heads, width) for i in (3, 4))
    caches = tuple(torch.randn(num_slots // 4, 4, heads, width).to(dtype) for _ in range(2))
    expected = [cache.clone() for cache in caches]
    slots = torch.randperm(num_slots)[None, :tokens].contiguous()
    for cache, new in zip(expected, (keys, values), strict=True):
        cache.flatten(0, 1)[slots[0]] = new[0]
    store = get_attention_type(attn_name=CPU_ATTENTION)["store"]
    store(keys, values, *caches, slot_mapping=slots)
    assert all(torch.equal(*pair) for pair in zip(caches, expected, strict=True))


@pytest.mark.parametrize("slot", [-1, 128])
def test_a_slot_that_the_cache_has_not_is_refused(slot: int):
    """The cache is a part of what memory there is: beside it nothing is written."""
    new, memory = torch.randn(1, 1, 2, 8), torch.zeros(34, 4, 2, 8)
    cache = memory[1:33]
    store = get_attention_type(attn_name=CPU_ATTENTION)["store"]
    with pytest.raises(IndexError, match=f"index {slot} is out of bounds"):
        store(new, new, cache, cache, slot_mapping=torch.tensor([[slot]]))
    assert not memory.any()


@pytest.mark.parametrize("missing", [0, 1])
def test_a_store_without_a_cache_is_refused(missing: int):
    step = make_step(Shape(lengths=[5]))
    caches = [None if i == missing else cache for i, cache in enumerate(step.caches)]
    with pytest.raises(AssertionError, match="needs a cache"):
        get_attention_type(attn_name=CPU_ATTENTION)["store"](
            step.keys, step.values, *caches, **step.kwargs
        )


# -- what is read ----------------------------------------------------------------------------------


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


# -- the compiler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [Shape(lengths=[5, 9]), Shape(lengths=[11], query_length=3)])
def test_the_operators_are_what_their_schemas_say(shape: Shape, compiled: bool):
    step = make_step(shape)
    kwargs = step.cpu_kwargs()
    torch.library.opcheck(
        torch.ops.spyre_mm.paged_store.default,
        (step.keys, step.values, *step.caches, step.kwargs["slot_mapping"]),
    )
    torch.library.opcheck(
        torch.ops.spyre_mm.paged_attention.default,
        (step.query, *step.caches, *kwargs.values(), 0.25, compiled),
    )


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", [CPU_ATTENTION, CPU_COMPILED_ATTENTION])
def test_one_graph_serves_every_step(name: str):
    """As the runner calls it: in one row, with metadata of one shape that comes from outside."""
    algorithm = get_attention_type(attn_name=name)
    most_rows, most_blocks = 6, 9

    def layer(step: dict[str, torch.Tensor], **kwargs: torch.Tensor) -> torch.Tensor:
        keys, values, _, _ = algorithm["store"](
            step["keys"] * 2, step["values"], step["key_cache"], step["value_cache"], **kwargs
        )
        return algorithm["compute_prefill"](
            step["query"], keys, values, 4, 2, 0.0, 0.25, **kwargs
        ).flatten(2)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for shape in [
        Shape(lengths=[23], query_length=7),
        Shape(lengths=[7], query_length=7),
        Shape(lengths=[5, 9, 3]),
        Shape(lengths=[2], query_length=2),
        Shape(lengths=[1, 1]),
        Shape(lengths=[28], query_length=20),
        Shape(lengths=[1, 30, 17, 3, 8]),
    ]:
        step = make_step(shape)
        derived = step.cpu_kwargs()
        rows, width = derived["kv_blocks"].shape
        pad = (0, most_rows - rows)
        kwargs = {
            "slot_mapping": step.kwargs["slot_mapping"].view(1, -1).clone(),
            "kv_blocks": F.pad(derived["kv_blocks"], (0, most_blocks - width, *pad)),
            "kv_lengths": F.pad(derived["kv_lengths"], pad),
            "query_lengths": F.pad(derived["query_lengths"], pad),
        }
        results = []
        for run in (layer, compiled):
            inputs = {
                name: getattr(step, name).flatten(0, 1)[None].clone()
                for name in ("query", "keys", "values")
            }
            # Larger than any step's own: how many blocks there are is fixed.
            caches = {
                name: F.pad(cache, (0, 0, 0, 0, 0, 0, 0, 40 - len(cache)))
                for name, cache in zip(("key_cache", "value_cache"), step.caches, strict=True)
            }
            results.append((run({**inputs, **caches}, **kwargs), *caches.values()))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert counter.frame_count == 1


def test_registering_twice_is_harmless():
    register_cpu_attention()
    register_cpu_attention()
    for name in (CPU_ATTENTION, CPU_COMPILED_ATTENTION):
        assert get_attention_type(attn_name=name)["is_prefill"]()

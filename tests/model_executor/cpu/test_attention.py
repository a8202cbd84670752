# SPDX-License-Identifier: Apache-2.0
"""The CPU's paged attention computes what FMS's reference does, compiled and not."""

import dataclasses

import fms.utils.spyre.paged  # noqa: F401 - registers the reference
import pytest
import torch
import torch.nn.functional as F
from fms.modules.attention import get_attention_type
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

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
from vllm_spyre_mm.model_executor.card.backend import CARD_ATTENTION
from vllm_spyre_mm.model_executor.cpu.attention import (
    CPU_ATTENTION,
    CPU_COMPILED_ATTENTION,
    register_cpu_attention,
)


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register_cpu_attention()


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

# SPDX-License-Identifier: Apache-2.0
"""One operation does what rotation, store and attention do one after the other."""

import operator
from typing import Any

import pytest
import torch
from fms.modules.attention import MultiHeadAttention
from fms.modules.positions import RotaryEmbedding
from torch import fx, nn

from vllm_spyre_mm.model_executor.cpu.attention import (
    CPU_ATTENTION,
    CPU_COMPILED_ATTENTION,
    register_cpu_attention,
)
from vllm_spyre_mm.model_executor.cpu.attention_fusion import fuse_attention
from vllm_spyre_mm.model_executor.cpu.kernels.rope import CpuRope, replace_rope

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, POSITIONS = 4, 2, 64, 64, 300
OPS = torch.ops.spyre_mm


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register_cpu_attention()
    fuse_attention(fx.GraphModule({}, fx.Graph()))


def rotary() -> RotaryEmbedding:
    made = RotaryEmbedding(HEAD_DIM, max_seq_len=POSITIONS)
    made.compute_freqs_cis(torch.device("cpu"), POSITIONS)
    return made


def make_step(
    lengths: list[int], query_length: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The arguments of the operation, in its order: a token of each sequence, or the last of one.

    A length of 0 is a row of padding, in block 0.
    """
    torch.manual_seed(sum(lengths))
    width = max(lengths) // BLOCK_SIZE + 1
    tokens = len(lengths) * query_length
    fused = torch.randn(1, tokens, HEADS + 2 * KV_HEADS, HEAD_DIM).to(dtype)
    query, keys, values = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
    blocks = 1 + torch.randperm(len(lengths) * width).view(len(lengths), width)
    rows = [
        (row, max(0, length - query_length + i))
        for row, length in enumerate(lengths)
        for i in range(query_length)
    ]
    slots = [
        int(blocks[row, at // BLOCK_SIZE]) * BLOCK_SIZE + at % BLOCK_SIZE if lengths[row] else 0
        for row, at in rows
    ]
    caches = torch.randn(2, len(lengths) * width + 1, BLOCK_SIZE, KV_HEADS, HEAD_DIM).to(dtype)
    return {
        "query": query,
        "keys": keys,
        "values": values,
        "key_cache": caches[0].clone(),
        "value_cache": caches[1].clone(),
        "position_ids": torch.tensor([[at for _, at in rows]]),
        "table": CpuRope(rotary()).table,
        "slot_mapping": torch.tensor([slots]),
        "kv_blocks": blocks.int(),
        "kv_lengths": torch.tensor(lengths, dtype=torch.int32),
        "query_lengths": torch.full((len(lengths),), query_length, dtype=torch.int32),
        "scale": 0.125,
    }


def one_after_the_other(step: dict[str, Any], *, compiled: bool = True) -> torch.Tensor:
    caches = step["key_cache"], step["value_cache"]
    query, keys = OPS.rope(step["query"], step["keys"], step["position_ids"], step["table"])
    OPS.paged_store(keys, step["values"], *caches, step["slot_mapping"])
    attends_to = (step[name] for name in ("kv_blocks", "kv_lengths", "query_lengths", "scale"))
    return OPS.paged_attention(query, *caches, *attends_to, compiled)


STEPS = {
    "decode": {"lengths": [1]},
    "padded decode": {"lengths": [70, 0]},
    "decodes": {"lengths": [5, 129, 64, 300, 1]},
    "chunk": {"lengths": [70], "query_length": 40},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_same(name: str, dtype: torch.dtype):
    step, other = (make_step(**STEPS[name], dtype=dtype) for _ in range(2))
    attended = OPS.rope_store_attend(*step.values())
    assert attended.is_contiguous()
    assert torch.equal(attended, one_after_the_other(other))
    for cache in ("key_cache", "value_cache"):
        assert torch.equal(step[cache], other[cache])


def with_own_table(step: dict[str, Any]) -> dict[str, Any]:
    """The same with a row of the table for each token in place of its position."""
    return {**step, "position_ids": None, "table": step["table"][step["position_ids"]]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STEPS)
def test_a_steps_own_table_is_the_same(name: str, dtype: torch.dtype):
    step, other, third = (make_step(**STEPS[name], dtype=dtype) for _ in range(3))
    attended = OPS.rope_store_attend(*with_own_table(step).values())
    assert torch.equal(attended, OPS.rope_store_attend(*other.values()))
    assert torch.equal(attended, one_after_the_other(with_own_table(third)))
    for cache in ("key_cache", "value_cache"):
        assert torch.equal(step[cache], other[cache])


@pytest.mark.parametrize("name", STEPS)
def test_a_table_with_too_few_rows_is_refused(name: str):
    step = with_own_table(make_step(**STEPS[name]))
    step["table"] = step["table"][:, :-1].contiguous()
    with pytest.raises(IndexError, match=r"1 (tokens|positions) are beyond"):
        OPS.rope_store_attend(*step.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_ids", -1),
        ("position_ids", POSITIONS),
        ("slot_mapping", -1),
        ("slot_mapping", 384),
    ],
)
def test_a_token_that_has_no_place_is_refused(name: str, value: int):
    step = make_step([70, 20])
    caches = [step[cache].clone() for cache in ("key_cache", "value_cache")]
    step[name][0, 1] = value
    message = f"1 tokens are beyond the model's {POSITIONS} positions or the 320 slots"
    with pytest.raises(IndexError, match=message):
        OPS.rope_store_attend(*step.values())
    assert all(map(torch.equal, caches, (step["key_cache"], step["value_cache"])))


@pytest.mark.parametrize("name", STEPS)
def test_the_operator_is_what_its_schema_says(name: str):
    step = make_step(**STEPS[name])
    torch.library.opcheck(OPS.rope_store_attend.default, (*step.values(),))
    torch.library.opcheck(OPS.rope_store_attend.default, (*with_own_table(step).values(),))


# -- the graph -------------------------------------------------------------------------------------


def make_graph(*, compiled: bool = True, keys_shown: bool = False) -> fx.GraphModule:
    """Of what FMS calls one after the other, as Dynamo writes it down."""
    graph = fx.Graph()
    given = {name: graph.placeholder(name) for name in make_step([1])}
    call = graph.call_function
    rotation = call(
        OPS.rope, tuple(given[name] for name in ("query", "keys", "position_ids", "table"))
    )
    query, keys = (call(operator.getitem, (rotation, i)) for i in range(2))
    caches = given["key_cache"], given["value_cache"]
    call(OPS.paged_store, (keys, given["values"], *caches, given["slot_mapping"]))
    attends_to = [given[name] for name in ("kv_blocks", "kv_lengths", "query_lengths", "scale")]
    attended = call(OPS.paged_attention, (query, *caches, *attends_to, compiled))
    graph.output((attended, keys) if keys_shown else attended)
    return fx.GraphModule({}, graph)


def names(module: fx.GraphModule) -> list[str]:
    return [
        str(node.target).removeprefix("spyre_mm.")
        for node in module.graph.nodes
        if "spyre_mm" in str(node.target)
    ]


def test_the_graph_has_one_operation_instead_of_three():
    module = make_graph()
    fuse_attention(module)
    assert names(module) == ["rope_store_attend"]
    step, other = (make_step([70, 20]) for _ in range(2))
    assert torch.equal(module(*step.values()), one_after_the_other(other))


@pytest.mark.parametrize("options", [{"compiled": False}, {"keys_shown": True}])
def test_what_is_not_of_that_form_is_left_alone(options: dict[str, bool]):
    module = make_graph(**options)
    fuse_attention(module)
    assert names(module) == ["rope", "paged_store", "paged_attention"]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("name", "fused"), [(CPU_COMPILED_ATTENTION, True), (CPU_ATTENTION, False)]
)
def test_fms_own_attention_is_of_that_form(name: str, fused: bool):
    attention = MultiHeadAttention(
        HEADS * HEAD_DIM, HEAD_DIM, HEAD_DIM, HEADS, KV_HEADS, position_encoder=rotary(), fused=True
    )
    attention.reset_parameters()
    replace_rope(nn.ModuleList([attention]))
    found: list[list[str]] = []

    def backend(module: fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        fuse_attention(module)
        found.append(names(module))
        return module

    step, other = make_step([70, 20]), make_step([70, 20])
    x = torch.randn(1, 2, HEADS * HEAD_DIM)

    def run(layer: Any, step: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            attended, _ = layer(
                x,
                position_ids=step["position_ids"],
                past_key_value_state=(step["key_cache"], step["value_cache"]),
                use_cache=True,
                attn_name=name,
                **{key: step[key] for key in ("slot_mapping", *list(step)[8:11])},
            )
        return attended

    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    torch.testing.assert_close(run(compiled, step), run(attention, other))
    assert torch.equal(step["key_cache"], other["key_cache"])
    assert ("rope_store_attend" in found[0]) == fused

# SPDX-License-Identifier: Apache-2.0
"""A graph of the project's operations runs as it stands; any other is left to the compiler."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from vllm_spyre_mm.model_executor.cpu import attention_fusion, bidirectional, linear_fusion
from vllm_spyre_mm.model_executor.cpu.eager_graph import eager_forward

OPS = torch.ops.spyre_mm
POSITIONS, HEADS, HEAD_DIM = 7, 2, 16
WIDTH = HEADS * HEAD_DIM


@pytest.fixture(autouse=True, scope="module")
def defined() -> None:
    attention_fusion.fuse_attention(fx.GraphModule({}, fx.Graph()))
    linear_fusion.fuse_linears(fx.GraphModule({}, fx.Graph()))


def make_graph(also: Callable[[fx.Graph, fx.Node], fx.Node] | None = None) -> fx.GraphModule:
    """Attention of a fused projection, and perhaps something after it."""
    graph = fx.Graph()
    fused, tokens = graph.placeholder("fused"), graph.placeholder("tokens")
    split = graph.call_method("split", ([WIDTH] * 3,), {"dim": -1})
    split.args = (fused, *split.args)
    parts = [
        graph.call_method(
            "view", (graph.call_function(operator.getitem, (split, i)), 1, tokens, HEADS, HEAD_DIM)
        )
        for i in range(3)
    ]
    last = graph.call_function(OPS.bidirectional_attention, (*parts, 0.25))
    graph.output((last if also is None else also(graph, last),))
    return fx.GraphModule({}, graph)


def called(module: fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@torch.inference_mode()
def test_the_projects_operations_and_views_need_no_compiler():
    module, untouched = make_graph(), make_graph()
    run = eager_forward(module)
    assert run is not None
    assert bidirectional.bidirectional_attention in called(module)
    assert OPS.bidirectional_attention not in called(module)
    fused = torch.randn(1, POSITIONS, 3 * WIDTH)
    torch.testing.assert_close(run(fused, POSITIONS), untouched(fused, POSITIONS))


@pytest.mark.parametrize(
    "also",
    [
        lambda graph, last: graph.call_function(operator.add, (last, last)),
        lambda graph, last: graph.call_function(torch.relu, (last,)),
        lambda graph, last: graph.call_method("contiguous", (last,)),
    ],
    ids=["operator", "function", "method"],
)
def test_what_computes_anything_else_is_left_as_it_is(also: Callable[[fx.Graph, fx.Node], fx.Node]):
    module = make_graph(also)
    before = called(module)
    assert eager_forward(module) is None
    assert called(module) == before


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("bidirectional_attention", bidirectional.bidirectional_attention),
        ("linear_in_block", linear_fusion.linear_in_block),
        ("rope_store_attend", attention_fusion.rope_store_attend),
    ],
)
def test_an_operator_and_its_function_take_the_same_arguments(
    name: str, function: Callable[..., Any]
):
    """They are called with the arguments that are in the graph, in that order."""
    schema = getattr(OPS, name).default._schema
    code = function.__code__
    assert [argument.name for argument in schema.arguments] == list(
        code.co_varnames[: code.co_argcount]
    )

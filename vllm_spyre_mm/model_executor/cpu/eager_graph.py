# SPDX-License-Identifier: Apache-2.0
"""Runs the FX graph of a block without a compiler, if it has the project's operators alone.

With the kernels of AVX-512 or AMX, fusing leaves five operators in a block, and views. There is
nothing for Inductor to compile; its wrapper code, AOTAutograd's, and PyTorch's dispatch from an
operator to Python take as long as the Python itself: a tenth of a step that decodes one sequence.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from vllm_spyre_mm.model_executor.cpu import (
    attention_fusion,
    bidirectional,
    linear_fusion,
    segmented,
)

VIEWS = ("split", "view")
"""Methods of a tensor that compute nothing."""


def eager_forward(graph_module: fx.GraphModule) -> Callable[..., Any] | None:
    """Return a function that runs a graph eagerly, calling the operators' implementations.

    Args:
        graph_module: of a block, after fusing; its operators are replaced, in place.

    Returns:
        A function of the graph's inputs; None, with the graph unchanged, if the graph computes
        anything but the project's operators.
    """
    nodes = graph_module.graph.nodes
    if not all(map(_is_view_or_own_op, nodes)):
        return None
    implementations = _implementations()
    for node in nodes:
        node.target = implementations.get(node.target, node.target)
    graph_module.recompile()
    return graph_module.forward


def _is_view_or_own_op(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target is operator.getitem or "spyre_mm." in str(node.target)
    return node.op in ("placeholder", "output") or node.target in VIEWS


def _implementations() -> Mapping[Any, Callable[..., Any]]:
    ops = torch.ops.spyre_mm
    return {
        ops.bidirectional_attention: bidirectional.bidirectional_attention,
        ops.linear_in_block: linear_fusion.linear_in_block,
        ops.rope_store_attend: attention_fusion.rope_store_attend,
        ops.segmented_attention: segmented.segmented_attention,
    }

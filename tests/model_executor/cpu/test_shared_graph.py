# SPDX-License-Identifier: Apache-2.0
"""One graph for the blocks of a model: theirs alone, with their own weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from vllm_spyre_mm.model_executor.cpu.shared_graph import SharedGraphError, share_graph

WIDTH = 16


class Block(nn.Module):
    """A layer with a weight and a number of its own, which returns as FMS's blocks do."""

    def __init__(self, width: int = WIDTH, scale: float = 2.0, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, WIDTH, bias=bias)
        self.scale = scale

    def forward(self, x: torch.Tensor, *, caches: Any = None, **extra: Any) -> Any:
        return torch.relu(self.linear(x)) * self.scale + extra["shift"], caches


class OtherBlock(Block):
    """Computes the same, by another class."""


def call(block: nn.Module, tokens: int, width: int = WIDTH) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(tokens)
    caches = (torch.zeros(1), torch.zeros(1))
    return block(x=torch.randn(1, tokens, width), caches=caches, shift=torch.ones(WIDTH))


def shared(*blocks: nn.Module) -> nn.ModuleList:
    """The blocks, where the first has made the graph."""
    torch._dynamo.reset()
    counters.clear()
    modules = nn.ModuleList(blocks)
    share_graph(modules, lambda inputs: torch._dynamo.mark_dynamic(inputs["x"], 1))
    with torch.inference_mode():
        call(modules[0], 5)
    return modules


@torch.inference_mode()
def test_blocks_that_are_alike_run_one_graph_with_their_own_weights():
    blocks = [Block() for _ in range(3)]
    expected = [[call(block, tokens)[0] for tokens in (5, 2, 77)] for block in blocks]
    modules = shared(*blocks)
    for block, values in zip(modules, expected, strict=True):
        for tokens, value in zip((5, 2, 77), values, strict=True):
            torch.testing.assert_close(call(block, tokens)[0], value)
    assert counters["stats"]["unique_graphs"] == 1


def test_there_may_be_no_block():
    share_graph(nn.ModuleList(), lambda inputs: None)


@torch.inference_mode()
def test_what_passes_through_a_block_is_returned_as_it_is():
    modules = shared(Block(), Block())
    caches = (torch.zeros(1), torch.zeros(1))
    for block in modules:
        _, returned = block(x=torch.randn(1, 3, WIDTH), caches=caches, shift=torch.ones(WIDTH))
        assert all(mine is theirs for mine, theirs in zip(caches, returned, strict=True))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Block(scale=3.0), "scale == 2.0"),
        (lambda: Block(bias=False), "bias"),
        (lambda: Block(width=2 * WIDTH), "size mismatch"),
        (lambda: Block().double(), "dtype mismatch"),
        (OtherBlock, "type Block"),
    ],
    ids=["number", "parameter", "shape", "dtype", "class"],
)
@torch.inference_mode()
def test_a_block_that_differs_is_refused(make: Callable[[], Block], reason: str):
    other = make()
    modules = shared(Block(), other)
    with pytest.raises(SharedGraphError, match="a layer differs from the first") as error:
        call(modules[1], 5, other.linear.in_features)
    assert reason in str(error.value)


@torch.inference_mode()
def test_the_compiled_code_checks_the_shapes_of_later_calls():
    (block,) = shared(Block())
    with pytest.raises(AssertionError, match="expected size"):
        call(block, 5, width=2 * WIDTH)

# SPDX-License-Identifier: Apache-2.0
"""Norms and residuals are computed with linear layers, and as FMS computes them in fp32."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fms.modules.feedforward import FeedForwardBlock, GatedLinearUnit
from fms.modules.layernorm import LayerNormParameterized
from torch import fx, nn

from tests.tiers import on_vector_tiers
from vllm_spyre_mm.model_executor.cpu.kernels import tiled_linear
from vllm_spyre_mm.model_executor.cpu.linear import replace_linears
from vllm_spyre_mm.model_executor.cpu.linear_fusion import HostNorm, fuse_linears, replace_norms
from vllm_spyre_mm.model_executor.cpu.shared_graph import share_graph


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def norm(width: int, *, centered: bool, shift: bool) -> LayerNormParameterized:
    made = LayerNormParameterized(
        width, elementwise_shift=shift, use_mean=centered, use_high_precision_pow=True, eps=1e-5
    )
    for parameter in made.parameters():
        parameter.normal_(1, 0.5)
    return made


class Block(nn.Module):
    """A pre-norm block as FMS writes them; the first residual is scaled as Granite's are."""

    def __init__(
        self, width: int, hidden: int, *, centered: bool, gated: bool, scale: float = 0.22
    ) -> None:
        super().__init__()
        self.norm1 = norm(width, centered=centered, shift=centered)
        self.project = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(3 * width, width, bias=False)
        self.norm2 = norm(width, centered=centered, shift=False)
        unit: Any = GatedLinearUnit if gated else FeedForwardBlock
        activation = nn.SiLU() if gated else nn.GELU("tanh")
        self.unit = unit(width, hidden / width, activation_fn=activation, p_dropout=0.0)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dense(torch.tanh(self.project(self.norm1(x)))) * self.scale + x
        return x + self.unit(self.norm2(x))


def fused(block: nn.Module, x: torch.Tensor) -> tuple[Callable[..., Any], fx.Graph]:
    """The block with what fusing made of its graph, run without a compiler."""
    blocks = nn.ModuleList([copy.deepcopy(block)])
    replace_linears(blocks, compiled=True)
    replace_norms(blocks)
    graphs = []

    def backend(graph_module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        fuse_linears(graph_module)
        graphs.append(graph_module.graph)
        return graph_module.forward

    torch._dynamo.reset()
    compiled: Any = torch.compile(blocks[0], backend=backend, fullgraph=True)
    compiled(x)
    return compiled, graphs[0]


def count(graph: fx.Graph, name: str) -> int:
    target = getattr(torch.ops.spyre_mm, name)
    return sum(node.target is target for node in graph.nodes)


@pytest.mark.usefixtures("tier")
@on_vector_tiers
@pytest.mark.parametrize("rows", [1, 16, 33, 300])
@pytest.mark.parametrize(("width", "hidden"), [(64, 96), (1184, 200)])
@pytest.mark.parametrize(("centered", "gated"), [(True, False), (False, True)])
def test_a_block_is_four_layers_and_computes_the_same(
    rows: int, width: int, hidden: int, centered: bool, gated: bool
):
    """Of 1,184 numbers the rows are packed in parts."""
    block = Block(width, hidden, centered=centered, gated=gated).bfloat16()
    x = 3 * torch.randn(1, rows, width, dtype=torch.bfloat16) + 1
    compiled, graph = fused(block, x)
    assert count(graph, "linear_in_block") == 4
    assert count(graph, "linear") == count(graph, "norm") == 0
    assert not any(node.target in (torch.add, torch.mul) for node in graph.nodes)
    expected = block.float()(x.float())
    torch.testing.assert_close(compiled(x).float(), expected, rtol=2**-5, atol=2**-5)


@pytest.mark.usefixtures("tier")
@on_vector_tiers
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_block_of_nothing_else_is_not_compiled(monkeypatch: pytest.MonkeyPatch):
    class Plain(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.dense(self.project(self.norm1(x))) * self.scale + x
            return x + self.unit(self.norm2(x))

    def compile_fx(*_: Any) -> None:
        raise AssertionError("there is nothing to compile")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    block = Plain(64, 96, centered=False, gated=True).bfloat16()
    blocks = nn.ModuleList([copy.deepcopy(block)])
    replace_linears(blocks, compiled=True)
    replace_norms(blocks)
    share_graph(blocks, lambda inputs: torch._dynamo.mark_dynamic(inputs["x"], 1))
    for rows in (33, 5, 100):
        x = torch.randn(1, rows, 64, dtype=torch.bfloat16)
        expected = copy.deepcopy(block).float()(x.float())
        torch.testing.assert_close(blocks[0](x=x).float(), expected, rtol=2**-5, atol=2**-5)


@pytest.mark.usefixtures("tier")
@on_vector_tiers
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (1, 1), (300, 1), (5000, 5), (0, 1e-3)])
def test_a_norm_is_exact_whatever_the_mean(mean: float, deviation: float, centered: bool):
    """Far from 0 the squares of rows have nothing in common with their variance."""
    layer = norm(288, centered=centered, shift=True)
    x = mean + deviation * torch.randn(40, 288).bfloat16()
    identity = tiled_linear.tile_weight(torch.eye(288, dtype=torch.bfloat16))
    parts = (layer.weight.bfloat16(), layer.bias.bfloat16(), centered, layer.eps)
    found = tiled_linear.tiled_linear(x, identity, None, 288, norm=tiled_linear.Norm(*parts))
    expected = layer.bfloat16().float()(x.float())
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.usefixtures("tier")
@on_vector_tiers
@pytest.mark.parametrize("centered", [True, False])
def test_a_norm_that_another_reads_too_is_computed_by_itself(centered: bool):
    class Shared(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            normed = self.norm1(x)
            return self.dense(self.project(normed)), normed

    block = Shared(64, 96, centered=centered, gated=False).bfloat16()
    x = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    compiled, graph = fused(block, x)
    assert count(graph, "norm") == 1
    assert count(graph, "linear") == 2
    for found, expected in zip(compiled(x), block.float()(x.float()), strict=True):
        torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-5)


@pytest.mark.usefixtures("tier")
@on_vector_tiers
def test_a_sum_that_is_no_residual_is_left_alone():
    """Another shape, and a layer whose result is wanted by itself as well."""

    class Sums(Block):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            projected = self.project(x)
            return self.dense(projected) + x[:, :1], projected + projected.tanh()

    block = Sums(64, 96, centered=True, gated=False).bfloat16()
    x = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    compiled, graph = fused(block, x)
    assert count(graph, "linear_in_block") == 0
    for found, expected in zip(compiled(x), block.float()(x.float()), strict=True):
        torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-5)


@on_vector_tiers
@pytest.mark.usefixtures("tier")
def test_a_result_that_meets_itself_is_left_alone():
    """A square and a double have no other operand."""

    class Twice(Block):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            projected, narrow = self.project(x), self.dense(self.project(x))
            return projected * projected, narrow + narrow

    block = Twice(64, 96, centered=True, gated=False).bfloat16()
    x = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    compiled, graph = fused(block, x)
    assert count(graph, "linear_in_block") == 0
    for found, expected in zip(compiled(x), block.float()(x.float()), strict=True):
        torch.testing.assert_close(found.float(), expected, rtol=2**-5, atol=2**-5)


def test_norms_that_the_kernel_does_not_take_stay():
    blocks = nn.ModuleList([Block(64, 96, centered=True, gated=False)])
    replace_norms(blocks)
    assert not any(isinstance(part, HostNorm) for part in blocks.modules())

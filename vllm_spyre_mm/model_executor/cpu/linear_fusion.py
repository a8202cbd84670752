# SPDX-License-Identifier: Apache-2.0
"""A graph pass that fuses norms and residuals with linear layers.

A norm of its own reads and writes every row once more, and so does adding a residual: in a tower
the two take a twentieth of the time, and in a decode as many calls as the layers. The kernel of the
tiled linear layer normalises rows as it packs them and adds the residual in its epilogue. The pass
finds them in the graph of a block, whatever its class.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from fms.modules.layernorm import LayerNormParameterized
from torch import fx, nn

from vllm_spyre_mm.model_executor.cpu.kernels import tiled_linear
from vllm_spyre_mm.model_executor.cpu.linear import define_linear, linear_tiled
from vllm_spyre_mm.model_executor.cpu.operators import define_operator, shape_of_first

ADD = (operator.add, torch.add)
MULTIPLY = (operator.mul, torch.mul)


class HostNorm(nn.Module):
    """FMS's norm on the host, computed in fp32 and rounded once.

    Args:
        norm: the module to replace; it has a weight.
    """

    def __init__(self, norm: LayerNormParameterized) -> None:
        super().__init__()
        _define_ops()
        self.weight = norm.weight
        self.bias = norm.bias if norm.elementwise_shift else None
        self.centered, self.epsilon = norm.use_mean, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., width)`` to ``(..., width)``."""
        return torch.ops.spyre_mm.norm(x, self.weight, self.bias, self.centered, self.epsilon)


def replace_norms(blocks: nn.ModuleList) -> None:
    """Replace the norms of blocks by :class:`HostNorm`, where the linear kernel can fuse them."""
    for block in blocks:
        for name, child in list(block.named_children()):
            if isinstance(child, LayerNormParameterized) and _takes_norm(child):
                setattr(block, name, HostNorm(child))


def _takes_norm(norm: LayerNormParameterized) -> bool:
    return (
        type(norm).forward is LayerNormParameterized.forward
        and norm.elementwise_scale
        and norm.weight.numel() % tiled_linear.BLOCK == 0
        and tiled_linear.KERNEL.takes(norm.weight.dtype)
    )


def fuse_linears(graph_module: fx.GraphModule) -> None:
    """Fuse norms and residuals with the linear layers beside them, in place.

    Args:
        graph_module: of a block, as Dynamo gives it to a compiler.
    """
    _define_ops()
    define_linear()
    graph = graph_module.graph
    for linear in [node for node in graph.nodes if _is_tiled_linear(node)]:
        _fuse(graph, linear)
    graph.eliminate_dead_code()
    graph_module.recompile()


def _fuse(graph: fx.Graph, linear: fx.Node) -> None:
    arguments: Any = linear.args
    x, weight, bias, outputs, activation = arguments
    norm = [None, None, False, 0.0]
    if _is(x, torch.ops.spyre_mm.norm) and all(map(_is_tiled_linear, x.users)):
        x, *norm = x.args
    last, residual, scale = linear, None, 1.0
    if activation is None:
        last, residual, scale = _find_residual(linear)
    if norm[0] is None and residual is None:
        return
    with graph.inserting_before(last):
        fused = graph.call_function(
            torch.ops.spyre_mm.linear_in_block,
            (x, *norm, weight, bias, outputs, activation, residual, scale),
        )
    fused.meta = last.meta.copy()
    last.replace_all_uses_with(fused)


def _find_residual(linear: fx.Node) -> tuple[fx.Node, fx.Node | None, float]:
    """Find ``scale * linear + residual``: the last node, the residual (or None) and the scale."""
    last, scale = linear, 1.0
    user = _only_user(last)
    if _is(user, *MULTIPLY):
        factor = _other_operand(user, last)
        if isinstance(factor, float):
            last, scale = user, factor
            user = _only_user(last)
    if _is(user, *ADD) and not user.kwargs:
        residual = _other_operand(user, last)
        if isinstance(residual, fx.Node) and _are_alike(residual, linear):
            return user, residual, scale
    return linear, None, 1.0


def _other_operand(node: fx.Node, operand: fx.Node) -> Any:
    """The other operand of a product or a sum; None if both are the same."""
    return next((part for part in node.args if part is not operand), None)


def _is_tiled_linear(node: Any) -> bool:
    return _is(node, torch.ops.spyre_mm.linear) and tiled_linear.is_tiled(_example(node.args[1]))


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in targets


def _only_user(node: fx.Node) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _are_alike(a: fx.Node, b: fx.Node) -> bool:
    return _example(a).shape == _example(b).shape and _example(a).dtype == _example(b).dtype


def _example(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["example_value"]
    return value


def _define_ops() -> None:
    define_operator(
        "norm(Tensor x, Tensor weight, Tensor? bias, bool centered, float epsilon) -> Tensor",
        CPU=_norm,
        Meta=shape_of_first,
    )
    define_operator(
        "linear_in_block(Tensor x, Tensor? norm_weight, Tensor? norm_bias, bool centered, "
        "float epsilon, Tensor weight, Tensor? bias, SymInt out_features, str? activation, "
        "Tensor? residual, float scale) -> Tensor",
        CPU=linear_in_block,
        Meta=_linear_in_block_shape,
    )


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    centered: bool,
    epsilon: float,
) -> torch.Tensor:
    """Implements the operator ``norm``, for norms that are not fused."""
    if centered:
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)
    result = F.rms_norm(x.float(), weight.shape, weight.float(), epsilon)
    return (result if bias is None else result + bias).to(x.dtype)


def linear_in_block(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    centered: bool,
    epsilon: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str | None,
    residual: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """``residual + scale * linear(norm(x))``, where the norm and the residual are optional."""
    norm = None
    if norm_weight is not None:
        norm = tiled_linear.Norm(norm_weight, norm_bias, centered, epsilon)
    fused = {"norm": norm, "residual": residual, "scale": scale}
    return linear_tiled(x, weight, bias, out_features, activation, **fused)


def _linear_in_block_shape(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return tiled_linear.empty_rows(x, arguments[6])

# SPDX-License-Identifier: Apache-2.0
"""Linear layers on the CPU: weights in the order in which they are multiplied.

oneDNN rearranges a bf16 weight in a checkpoint's row-major layout at every call, which for the few
rows of a decode costs more than the arithmetic. Here it is rearranged once, and replaces the
original: for the project's own kernel where the CPU has AVX-512 (:mod:`tiled_linear`), else for
oneDNN. That of a tied
head stays in rows, for its embedding (:mod:`rows_linear`). For fp32 there is nothing to gain.

The operation is opaque to the compiler, and the weight an input of its graph: one graph serves
every layer.
"""

import functools
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from fms.modules.feedforward import FeedForwardBlock, GatedLinearUnit
from fms.modules.head import LinearClassificationHead
from torch import nn

from vllm_spyre_mm.host_memory import return_free_memory
from vllm_spyre_mm.model_executor.cpu.kernels import rows_linear, tiled_linear
from vllm_spyre_mm.model_executor.cpu.tier import computes_in_bf16

HOST_LINEARS = (nn.Linear, LinearClassificationHead)
"""What is replaced: FMS's head is a linear layer with a way to shard it."""

GELUS = {"gelu": "none", tiled_linear.GELU_TANH: "tanh"}
"""``approximate`` of ``nn.GELU``, by the operator's name of it."""


class HostLinear(nn.Module):
    """``nn.Linear`` on the host.

    Args:
        linear: what it replaces; its weight is left to whoever else refers to it.
        activation: a GELU that follows it and is computed with it, if there is one.
        compiled: take the project's kernels where the CPU's tier has them.
        tied: an embedding has the same weight; the kernels leave it as it is.
    """

    def __init__(
        self,
        linear: nn.Linear,
        activation: nn.GELU | None = None,
        *,
        compiled: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        define_linear()
        names = {approximate: name for name, approximate in GELUS.items()}
        self.activation = None if activation is None else names[activation.approximate]
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        if compiled and tiled_linear.KERNEL.takes(weight.dtype):
            weight = weight if tied else tiled_linear.tile_weight(weight)
        elif weight.dtype == torch.bfloat16 and computes_in_bf16():
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        return torch.ops.spyre_mm.linear(
            x, self.weight, self.bias, self.out_features, self.activation
        )

    def extra_repr(self) -> str:
        """Shape and layout, for ``print(model)``."""
        layout = "oneDNN's" if self.weight.is_mkldnn else tuple(self.weight.shape)
        shape = f"{self.in_features}, {self.out_features}"
        return f"{shape}, layout={layout}, activation={self.activation}"


class HostGatedUnit(nn.Module):
    """FMS's ``GatedLinearUnit`` on the host: gates are computed with the layer that makes them.

    Args:
        unit: what it replaces, :func:`_takes_gates` has accepted it.
    """

    def __init__(self, unit: GatedLinearUnit) -> None:
        super().__init__()
        define_linear()
        fused = cast("nn.Linear", unit.wg1_fused)
        weight = tiled_linear.tile_weight(tiled_linear.interleave_gates(fused.weight.detach()))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        if fused.bias is not None:
            bias = tiled_linear.interleave_gates(fused.bias.detach())
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.hidden_dim = unit.hidden_dim
        self.w2 = cast("nn.Linear", unit.w2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., width)`` to ``(..., width)``."""
        gated = torch.ops.spyre_mm.linear(
            x, self.weight, self.bias, self.hidden_dim, tiled_linear.SILU_GATED
        )
        return self.w2(gated)


def _takes_gates(part: nn.Module) -> TypeGuard[GatedLinearUnit]:
    return (
        type(part) is GatedLinearUnit
        and part.fused
        and type(part.wg1_fused) is nn.Linear
        and type(part.a) is nn.SiLU
        and tiled_linear.KERNEL.takes(part.wg1_fused.weight.dtype)
    )


class HostPatches(nn.Module):
    """A convolution of patches that do not overlap: a linear layer of each one's pixels.

    PyTorch's convolution leaves the patches across the rows of what follows, which then reads and
    writes it element by element.

    Args:
        convolution: what it replaces.
        compiled: as for :class:`HostLinear`.
    """

    def __init__(self, convolution: nn.Conv2d, *, compiled: bool = False) -> None:
        super().__init__()
        self.patch = convolution.kernel_size
        weight = convolution.weight.flatten(1)
        linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = cast("nn.Parameter", convolution.bias)
        self.linear = HostLinear(linear, compiled=compiled)

    @property
    def weight(self) -> nn.Parameter:
        """What others ask for the dtype."""
        return self.linear.weight

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(tiles, channels, height, width)`` to ``(tiles, hidden_size, rows, columns)``, where
        the patches of a tile lie one after the other."""
        (high, wide), (height, width) = self.patch, pixels.shape[-2:]
        whole = pixels[..., : height // high * high, : width // wide * wide]
        patches = whole.unflatten(3, (-1, wide)).unflatten(2, (-1, high)).permute(0, 2, 4, 1, 3, 5)
        return self.linear(patches.flatten(3)).permute(0, 3, 1, 2)


def _cuts_patches(part: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        isinstance(part, nn.Conv2d)
        and part.kernel_size == part.stride
        and part.padding in ((0, 0), "valid")
        and part.dilation == (1, 1)
        and part.groups == 1
    )


def replace_linears(module: nn.Module, *, compiled: bool = False) -> None:
    """Replace every ``nn.Linear`` below a module on the host, and what cuts patches, one at a time.

    Args:
        module: what they are below.
        compiled: take the project's kernels where the CPU's tier has them. Without them a bf16 head
            that is tied to the embedding is held twice: the embedding keeps its rows.
    """
    # Nothing here may keep a layer that was replaced: its weight has to go before the next comes.
    embeddings = {
        part.weight.data_ptr() for part in module.modules() if isinstance(part, nn.Embedding)
    }

    def replace(linear: nn.Linear, activation: nn.GELU | None = None) -> HostLinear:
        tied = linear.weight.data_ptr() in embeddings
        return HostLinear(linear, activation, compiled=compiled, tied=tied)

    gated = [
        (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if compiled and _takes_gates(child)
    ]
    for parent, name in gated:
        setattr(parent, name, HostGatedUnit(getattr(parent, name)))
    parents = [part for part in module.modules() if not isinstance(part, nn.Linear)]
    for parent in parents:
        if isinstance(parent, FeedForwardBlock) and isinstance(parent.a, nn.GELU):
            parent.w1 = replace(cast("nn.Linear", parent.w1), parent.a)
            parent.a = nn.Identity()
        for name in [
            name for name, child in parent.named_children() if type(child) in HOST_LINEARS
        ]:
            setattr(parent, name, replace(getattr(parent, name)))
        for name, child in list(parent.named_children()):
            if _cuts_patches(child):
                setattr(parent, name, HostPatches(child, compiled=compiled))
    return_free_memory()


@functools.cache
def define_linear() -> torch.library.Library:
    """Define the operator; it lives as long as the returned library, which the cache keeps."""
    library = torch.library.Library("spyre_mm", "FRAGMENT")
    library.define(
        "linear(Tensor x, Tensor weight, Tensor? bias, SymInt out_features, "
        "str? activation) -> Tensor"
    )
    library.impl("linear", _linear_packed, "MkldnnCPU")
    library.impl("linear", _linear_dense, "CPU")
    library.impl("linear", _linear_shape, "Meta")
    return library


def _linear_packed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str | None,
) -> torch.Tensor:
    name, variant = ("none", "") if activation is None else ("gelu", GELUS[activation])
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, name, [], variant)


def _linear_dense(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str | None,
) -> torch.Tensor:
    if tiled_linear.is_tiled(weight):
        return linear_tiled(x, weight, bias, out_features, activation)
    # As a matrix: F.linear copies the weight for a slice of a three-dimensional tensor.
    rows = x.reshape(-1, x.shape[-1])
    few = rows_linear.takes(rows, weight)
    result = (rows_linear.rows_linear if few else F.linear)(rows, weight, bias)
    result = result.view(*x.shape[:-1], out_features)
    return result if activation is None else _gelu_(result, activation)


def linear_tiled(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str | None,
    **around: Any,
) -> torch.Tensor:
    """The linear layer of a tiled weight, with any activation.

    Args:
        x: ``(..., in_features)``.
        weight: of ``tiled_linear.tile_weight``.
        bias: ``(out_features,)``.
        out_features: of the layer.
        activation: one of :data:`GELUS`, or ``SILU_GATED``.
        around: what else ``tiled_linear.tiled_linear`` computes with it.
    """
    beside = activation if activation in tiled_linear.ACTIVATIONS else None
    result = tiled_linear.tiled_linear(x, weight, bias, out_features, beside, **around)
    return result if activation is None or beside else _gelu_(result, activation)


def _gelu_(x: torch.Tensor, activation: str) -> torch.Tensor:
    return torch.ops.aten.gelu_(x, approximate=GELUS[activation])


def _linear_shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str | None,
) -> torch.Tensor:
    if tiled_linear.is_tiled(weight):
        return tiled_linear.empty_rows(x, out_features)
    return x.new_empty((*x.shape[:-1], out_features))

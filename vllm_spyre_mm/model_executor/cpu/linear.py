# SPDX-License-Identifier: Apache-2.0
"""Linear layers on the CPU, with prepacked weights.

oneDNN packs a bf16 weight in a checkpoint's row-major layout at every call, which for the few rows
of a decode costs more than the GEMM. Here it is packed once and replaces the original: for the
project's kernel where the CPU has AVX-512 (:mod:`tiled_linear`), else for oneDNN, where PyTorch has
it. The weight of a tied LM head stays row-major, for the embedding (:mod:`rows_linear`). fp32 gains
nothing.

The operator is opaque to the compiler, and the weight an input of its graph, so one graph serves
every layer.
"""

from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from fms.modules.feedforward import FeedForwardBlock, GatedLinearUnit
from fms.modules.head import LinearClassificationHead
from torch import nn

from vllm_spyre_mm.host_memory import return_free_memory
from vllm_spyre_mm.model_executor.cpu.kernels import rows_linear, tiled_linear
from vllm_spyre_mm.model_executor.cpu.operators import define_operator
from vllm_spyre_mm.model_executor.cpu.tier import computes_in_bf16
from vllm_spyre_mm.model_executor.cpu.torch_internals import packs_linears

HOST_LINEARS = (nn.Linear, LinearClassificationHead)
"""Classes that are replaced; FMS's LM head is a linear layer that can be sharded."""

GELUS = {"gelu": "none", tiled_linear.GELU_TANH: "tanh"}
"""``approximate`` of ``nn.GELU``, by the operator's name of the activation."""


class HostLinear(nn.Module):
    """``nn.Linear`` on the host, perhaps with a GELU after it.

    Args:
        linear: the layer to replace; its weight is not modified.
        activation: a GELU that follows the layer and is fused with it, or None.
        compiled: use the C++ kernels where the CPU's tier has them.
        tied: whether an embedding shares the weight; then the kernels use it row-major.
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
        elif weight.dtype == torch.bfloat16 and computes_in_bf16() and packs_linears():
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


class HostSwiGLU(nn.Module):
    """SwiGLU on the host: the gating is fused with the linear layer before it.

    Args:
        unit: the FMS module to replace; :func:`_is_swiglu` has accepted it.
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
            x, self.weight, self.bias, self.hidden_dim, tiled_linear.SWIGLU
        )
        return self.w2(gated)


def _is_swiglu(part: nn.Module) -> TypeGuard[GatedLinearUnit]:
    return (
        type(part) is GatedLinearUnit
        and part.fused
        and type(part.wg1_fused) is nn.Linear
        and type(part.a) is nn.SiLU
        and tiled_linear.KERNEL.takes(part.wg1_fused.weight.dtype)
    )


class HostPatches(nn.Module):
    """A convolution over patches that do not overlap, as a linear layer over each patch's pixels.

    PyTorch's convolution returns channels-first memory, which the following layers would read and
    write element by element.

    Args:
        convolution: the module to replace.
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
        """The weight, which callers read the dtype from."""
        return self.linear.weight

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(tiles, channels, height, width)`` to ``(tiles, hidden_size, rows, columns)``, with the
        channels of a patch contiguous."""
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
    """Replace the linear layers, SwiGLUs and patch convolutions of a module, one at a time.

    Args:
        module: whose submodules are replaced, in place.
        compiled: use the C++ kernels where the CPU's tier has them. Without them a tied bf16 LM
            head is in memory twice: packed, and as the embedding.
    """
    # No reference to a replaced layer may stay: its weight has to be freed before the next is made.
    embeddings = {
        part.weight.data_ptr() for part in module.modules() if isinstance(part, nn.Embedding)
    }

    def replace(linear: nn.Linear, activation: nn.GELU | None = None) -> HostLinear:
        tied = linear.weight.data_ptr() in embeddings
        return HostLinear(linear, activation, compiled=compiled, tied=tied)

    swiglus = [
        (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if compiled and _is_swiglu(child)
    ]
    for parent, name in swiglus:
        setattr(parent, name, HostSwiGLU(getattr(parent, name)))
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


def define_linear() -> None:
    """Define the operator, if it is not."""
    define_operator(
        "linear(Tensor x, Tensor weight, Tensor? bias, SymInt out_features, "
        "str? activation) -> Tensor",
        MkldnnCPU=_linear_packed,
        CPU=_linear_dense,
        Meta=_linear_shape,
    )


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
    # Flattened: F.linear copies the weight for a slice of a three-dimensional tensor.
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
    **fused: Any,
) -> torch.Tensor:
    """A linear layer with a tiled weight, and any activation.

    Args:
        x: ``(..., in_features)``.
        weight: of ``tiled_linear.tile_weight``.
        bias: ``(out_features,)``.
        out_features: of the layer.
        activation: one of :data:`GELUS`, or ``SWIGLU``.
        fused: further arguments of ``tiled_linear.tiled_linear``: a norm, a residual.
    """
    in_kernel = activation if activation in tiled_linear.ACTIVATIONS else None
    result = tiled_linear.tiled_linear(x, weight, bias, out_features, in_kernel, **fused)
    return result if activation is None or in_kernel else _gelu_(result, activation)


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

# SPDX-License-Identifier: Apache-2.0
"""Linear layers on the CPU: weights that oneDNN reads as they lie in memory.

oneDNN rearranges a bf16 weight in a checkpoint's row-major layout at every call, which for the few
rows of a decode costs more than the arithmetic. Here it is rearranged once, and replaces the
original. For fp32 there is nothing to gain.

The operation is opaque to the compiler, and the weight an input of its graph: one graph serves
every layer.
"""

import ctypes
import functools
from typing import cast

import torch
import torch.nn.functional as F
from fms.modules.feedforward import FeedForwardBlock
from fms.modules.head import LinearClassificationHead
from torch import nn

HOST_LINEARS = (nn.Linear, LinearClassificationHead)
"""What is replaced: FMS's head is a linear layer with a way to shard it."""


class HostLinear(nn.Module):
    """``nn.Linear`` on the host.

    Args:
        linear: what it replaces; its weight is left to whoever else refers to it.
        activation: a GELU that follows it and is computed with it, if there is one.
    """

    def __init__(self, linear: nn.Linear, activation: nn.GELU | None = None) -> None:
        super().__init__()
        _define_op()
        self.gelu = None if activation is None else activation.approximate
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        if weight.dtype == torch.bfloat16:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        return torch.ops.spyre_mm.linear(x, self.weight, self.bias, self.out_features, self.gelu)

    def extra_repr(self) -> str:
        """Shape and layout, for ``print(model)``."""
        packed = self.weight.is_mkldnn
        return f"{self.in_features}, {self.out_features}, packed={packed}, gelu={self.gelu}"


def pack_linears(module: nn.Module) -> None:
    """Replace every ``nn.Linear`` below a module on the host, one at a time.

    A head that is tied to the embedding is packed too: the embedding keeps its rows.
    """
    # Nothing here may keep a layer that was replaced: its weight has to go before the next comes.
    parents = [part for part in module.modules() if not isinstance(part, nn.Linear)]
    for parent in parents:
        if isinstance(parent, FeedForwardBlock) and isinstance(parent.a, nn.GELU):
            parent.w1, parent.a = HostLinear(cast("nn.Linear", parent.w1), parent.a), nn.Identity()
        for name in [
            name for name, child in parent.named_children() if type(child) in HOST_LINEARS
        ]:
            setattr(parent, name, HostLinear(cast("nn.Linear", getattr(parent, name))))
    _return_free_memory()


def _return_free_memory() -> None:
    """Give the operating system what the replaced weights left behind; glibc would keep it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def _define_op() -> torch.library.Library:
    """Define the operator; it lives as long as the returned library, which the cache keeps."""
    library = torch.library.Library("spyre_mm", "FRAGMENT")
    library.define(
        "linear(Tensor x, Tensor weight, Tensor? bias, SymInt out_features, str? gelu) -> Tensor"
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
    gelu: str | None,
) -> torch.Tensor:
    name, variant = ("none", "") if gelu is None else ("gelu", gelu)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, name, [], variant)


def _linear_dense(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    gelu: str | None,
) -> torch.Tensor:
    # As a matrix: F.linear copies the weight for a slice of a three-dimensional tensor.
    rows = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    if gelu is not None:
        rows = F.gelu(rows, approximate=gelu)
    return rows.view(*x.shape[:-1], out_features)


def _linear_shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    gelu: str | None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))

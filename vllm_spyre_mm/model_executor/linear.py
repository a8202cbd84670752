# SPDX-License-Identifier: Apache-2.0
"""Linear layers on the CPU: weights that are read as they lie in memory.

oneDNN rearranges a bf16 weight in a checkpoint's row-major layout at every call, which for the few
rows of a decode costs more than the arithmetic. Here it is rearranged once, and replaces the
original; or it is kept in rows, which the project's own kernel reads (:mod:`rows_linear`). For fp32
there is nothing to gain.

The operation is opaque to the compiler, and the weight an input of its graph: one graph serves
every layer.
"""

import functools
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from fms.modules.feedforward import FeedForwardBlock
from fms.modules.head import LinearClassificationHead
from torch import nn

from vllm_spyre_mm.model_executor import rows_linear
from vllm_spyre_mm.model_executor.gelu import gelu_tanh_
from vllm_spyre_mm.model_executor.memory import return_free_memory

HOST_LINEARS = (nn.Linear, LinearClassificationHead)
"""What is replaced: FMS's head is a linear layer with a way to shard it."""


COMPILED_TANH = "tanh, compiled"
"""The operator's name of the GELU that :mod:`gelu` computes."""


class HostLinear(nn.Module):
    """``nn.Linear`` on the host.

    Args:
        linear: what it replaces; its weight is left to whoever else refers to it.
        activation: a GELU that follows it and is computed with it, if there is one.
        in_rows: keep a bf16 weight as it is.
        compiled: take the project's kernel for a GELU that it computes (:mod:`gelu`).
    """

    def __init__(
        self,
        linear: nn.Linear,
        activation: nn.GELU | None = None,
        *,
        in_rows: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        _define_op()
        self.gelu = None if activation is None else activation.approximate
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        if weight.dtype == torch.bfloat16 and not in_rows:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        if compiled and self.gelu == "tanh" and weight.dtype == torch.bfloat16:
            self.gelu = COMPILED_TANH
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        return torch.ops.spyre_mm.linear(x, self.weight, self.bias, self.out_features, self.gelu)

    def extra_repr(self) -> str:
        """Shape and layout, for ``print(model)``."""
        packed = self.weight.is_mkldnn
        return f"{self.in_features}, {self.out_features}, packed={packed}, gelu={self.gelu}"


class HostPatches(nn.Module):
    """A convolution of patches that do not overlap: a linear layer of each one's pixels.

    PyTorch's convolution leaves the patches across the rows of what follows, which then reads and
    writes it element by element.

    Args:
        convolution: what it replaces.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.patch = convolution.kernel_size
        weight = convolution.weight.flatten(1)
        linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = cast("nn.Parameter", convolution.bias)
        self.linear = HostLinear(linear)

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


def replace_linears(module: nn.Module, *, in_rows: bool = False, compiled: bool = False) -> None:
    """Replace every ``nn.Linear`` below a module on the host, and what cuts patches, one at a time.

    Args:
        module: what they are below.
        in_rows: keep bf16 weights as they are. Otherwise they are rearranged, and a head that is
            tied to the embedding is held twice: the embedding keeps its rows.
        compiled: take the project's kernel for a GELU that it computes.
    """
    # Nothing here may keep a layer that was replaced: its weight has to go before the next comes.
    parents = [part for part in module.modules() if not isinstance(part, nn.Linear)]
    for parent in parents:
        if isinstance(parent, FeedForwardBlock) and isinstance(parent.a, nn.GELU):
            parent.w1 = HostLinear(
                cast("nn.Linear", parent.w1), parent.a, in_rows=in_rows, compiled=compiled
            )
            parent.a = nn.Identity()
        for name in [
            name for name, child in parent.named_children() if type(child) in HOST_LINEARS
        ]:
            setattr(parent, name, HostLinear(getattr(parent, name), in_rows=in_rows))
        for name, child in list(parent.named_children()):
            if _cuts_patches(child):
                setattr(parent, name, HostPatches(child))
    return_free_memory()


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
    if gelu == COMPILED_TANH:
        return gelu_tanh_(_linear_packed(x, weight, bias, out_features, None))
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
    rows = x.reshape(-1, x.shape[-1])
    few = rows_linear.takes(rows, weight)
    rows = rows_linear.rows_linear(rows, weight, bias) if few else F.linear(rows, weight, bias)
    if gelu == COMPILED_TANH:
        rows = gelu_tanh_(rows)
    elif gelu is not None:
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

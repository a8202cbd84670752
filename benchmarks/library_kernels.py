# SPDX-License-Identifier: Apache-2.0
"""What PyTorch gives in place of the project's kernels: plain, packed by oneDNN, or compiled."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Kernel = Callable[[], torch.Tensor]
PLAIN, ONEDNN = "PyTorch", "oneDNN, packed"
FROZEN, TUNED = "Inductor, frozen", "Inductor's GEMM templates"
INDUCTOR, FLEX = "Inductor", "flex attention"
FREEZING = {"freezing": True}
AUTOTUNE = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP",
}


def make_linears(
    rows: int, width: int, outputs: int, layers: int
) -> tuple[torch.Tensor, list[nn.Linear]]:
    """Rows ``(rows, width)``, and layers to multiply them with; bf16."""
    linears = [nn.Linear(width, outputs, dtype=torch.bfloat16) for _ in range(layers)]
    for linear in linears:
        linear.requires_grad_(False)
    return torch.randn(rows, width).bfloat16(), linears


def linears(x: torch.Tensor, layers: list[nn.Linear], gelu: bool) -> dict[str, Kernel]:
    """The last result of the layers, a GELU after each or not."""
    name, variant = ("gelu", "tanh") if gelu else ("none", "")
    packed = [torch.ops.mkldnn._reorder_linear_weight(layer.weight, None) for layer in layers]

    def with_packed() -> torch.Tensor:
        for layer, weight in zip(layers, packed, strict=True):
            result = torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, name, [], variant)
        return result

    stack = Stack(layers, gelu)
    kernels: dict[str, Kernel] = {PLAIN: lambda: stack(x)[-1], ONEDNN: with_packed}
    for title, options in ((FROZEN, FREEZING), (TUNED, AUTOTUNE)):
        torch._dynamo.reset()
        kernels[title] = _compiled_last(Stack(layers, gelu), options, x)
    return kernels


class Stack(nn.Module):
    """Linear layers of the same rows."""

    def __init__(self, layers: list[nn.Linear], gelu: bool) -> None:
        super().__init__()
        self.layers, self.gelu = nn.ModuleList(layers), gelu

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The result of each."""
        results = [layer(x) for layer in self.layers]
        return [F.gelu(each, approximate="tanh") for each in results] if self.gelu else results


def _compiled_last(module: nn.Module, options: dict[str, Any], x: torch.Tensor) -> Kernel:
    compiled = torch.compile(module, dynamic=False)
    # Not as options of the call: Dynamo looks at the process's settings for what it may freeze.
    with torch._inductor.config.patch(options):
        compiled(x)
    return lambda: compiled(x)[-1]


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, causal: bool
) -> dict[str, Kernel]:
    """All are ``(batch, positions, heads, head_dim)``; the queries are the last positions."""
    head_major = [part.transpose(1, 2).contiguous() for part in (query, keys, values)]
    kernels = {"SDPA": _sdpa(*head_major, causal)}
    kernels[FLEX] = _flex(*head_major, causal)
    return kernels


def _sdpa(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool) -> Kernel:
    batch, heads, queries, head_dim = query.shape
    kv_heads, total = keys.shape[1:3]
    group = heads // kv_heads
    if queries == 1:  # the queries that share a KV head as rows of one head: the fastest way
        rows = query.view(batch, kv_heads, group, head_dim)
        return lambda: F.scaled_dot_product_attention(rows, keys, values).view(
            batch, 1, heads, head_dim
        )
    repeated = [part.repeat_interleave(group, 1) for part in (keys, values)]
    mask = None
    if causal:
        ends = torch.arange(total - queries, total).unsqueeze(1)
        mask = torch.zeros(queries, total, dtype=query.dtype)
        mask.masked_fill_(torch.arange(total) > ends, -torch.inf)
    return lambda: F.scaled_dot_product_attention(query, *repeated, attn_mask=mask).transpose(1, 2)


def _flex(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool) -> Kernel:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    queries, total = query.shape[2], keys.shape[2]
    mask = None
    if causal:
        earlier = total - queries

        def sees(batch: Any, head: Any, q: Any, kv: Any) -> Any:
            return q + earlier >= kv

        mask = create_block_mask(sees, None, None, queries, total, device="cpu")
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def run() -> torch.Tensor:
        attended: Any = compiled(query, keys, values, block_mask=mask, enable_gqa=True)
        return attended.transpose(1, 2)

    run()
    return run


def argmax(logits: torch.Tensor) -> dict[str, Kernel]:
    """Of each row."""
    return {
        PLAIN: lambda: logits.argmax(-1),
        INDUCTOR: _compiled(lambda x: x.argmax(-1), logits),
    }


def rope(query: torch.Tensor, keys: torch.Tensor, table: torch.Tensor) -> dict[str, Kernel]:
    """As FMS rotates: neighbouring pairs, by a table of cosines and sines."""
    tokens = query.shape[1]
    cosine, sine = table[:tokens, None].unbind(-1)

    def rotate(part: torch.Tensor) -> torch.Tensor:
        even, odd = part.float().unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1)
        return rotated.flatten(-2).to(part.dtype)

    def both(query: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotate(query), rotate(keys)

    torch._dynamo.reset()
    compiled = torch.compile(both, dynamic=False)
    compiled(query, keys)
    return {PLAIN: lambda: both(query, keys)[0], INDUCTOR: lambda: compiled(query, keys)[0]}


def _compiled(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Kernel:
    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=False)
    compiled(x)
    return lambda: compiled(x)

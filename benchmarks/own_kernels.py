# SPDX-License-Identifier: Apache-2.0
"""The project's kernels, as its model takes them; the benchmark names them here alone."""

from collections.abc import Callable

import torch
from torch import nn

from vllm_spyre_mm.model_executor.cpu import bidirectional
from vllm_spyre_mm.model_executor.cpu.attention import (
    CPU_COMPILED_ATTENTION,
    cpu_attention_kwargs,
    register_cpu_attention,
)
from vllm_spyre_mm.model_executor.cpu.kernels.rope import rotate
from vllm_spyre_mm.model_executor.cpu.linear import HostLinear
from vllm_spyre_mm.worker.sampler import HostSampler

Kernel = Callable[[], torch.Tensor]


def linear(x: torch.Tensor, linears: list[nn.Linear], gelu: bool) -> Kernel:
    """The last result of some linear layers of the same rows, ``(rows, outputs)``."""
    activation = nn.GELU(approximate="tanh") if gelu else None
    layers = [HostLinear(each, activation, compiled=True) for each in linears]
    return lambda: [layer(x) for layer in layers][-1]


def attention_to_all(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Kernel:
    """A tower's attention: all are ``(batch, positions, heads, head_dim)``."""
    scale = query.shape[-1] ** -0.5
    return lambda: bidirectional.bidirectional_attention(query, keys, values, scale)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    table: torch.Tensor,
    keys: int,
) -> Kernel:
    """Attention of the last ``(batch, queries, heads, head_dim)`` of ``keys`` tokens each.

    Args:
        query: as above.
        key_cache: ``(blocks, block_size, kv_heads, head_dim)``.
        value_cache: likewise.
        table: int64 ``(batch, blocks)``.
        keys: tokens of each sequence.
    """
    from fms.modules.attention import get_attention_type

    register_cpu_attention()
    heads, head_dim = query.shape[2:]
    block_size, kv_heads = key_cache.shape[1:3]
    lengths = torch.full((len(table),), keys)
    padding = torch.zeros_like(lengths)
    kwargs = cpu_attention_kwargs(table, lengths, padding, query.shape[1], block_size)
    compute = get_attention_type(attn_name=CPU_COMPILED_ATTENTION)["compute_prefill"]
    scale = head_dim**-0.5
    return lambda: compute(query, key_cache, value_cache, heads, kv_heads, 0.0, scale, **kwargs)


def argmax(logits: torch.Tensor) -> Kernel:
    """Of each row of fp32 ``(rows, width)``."""
    return lambda: HostSampler.greedy_sample(logits)


def rope(query: torch.Tensor, keys: torch.Tensor, table: torch.Tensor) -> Kernel:
    """Of ``(1, tokens, heads, head_dim)``; fp32 table ``(positions, head_dim / 2, 2)``."""
    positions = torch.arange(query.shape[1]).unsqueeze(0)
    return lambda: rotate(query, keys, positions, table)[0]

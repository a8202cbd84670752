# SPDX-License-Identifier: Apache-2.0
"""Paged attention on the CPU, as an FMS attention algorithm.

It takes the keyword arguments of FMS's ``spyre_paged_attn`` (which the card runs, and which on a
CPU copies the whole cache at every store and loops over tokens in Python), and two more that are
derived from them once a step rather than once a layer: see :func:`cpu_attention_kwargs`.

Both operations are opaque to the compiler, so that one compiled block serves every length.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F

CPU_ATTENTION = "spyre_mm_cpu_paged_attn"
"""Name of the algorithm, FMS's ``attn_name``."""

CARD_ATTENTION = "spyre_paged_attn"
"""Name of FMS's own algorithm for the card."""


@functools.cache
def register_cpu_attention() -> None:
    """Make :data:`CPU_ATTENTION` known to FMS; repeatable."""
    from fms.modules.attention import register_attention_op

    _define_ops()
    register_attention_op(
        CPU_ATTENTION,
        store_op=_store,
        compute_op=_compute,
        is_prefill_op=lambda **_: True,
    )


def cpu_attention_kwargs(
    block_table: torch.Tensor,
    current_tkv_mask: torch.Tensor,
    left_padded_prompt_mask: torch.Tensor,
    query_length: int,
    block_size: int,
) -> dict[str, torch.Tensor]:
    """Cache rows to read and which of them each query sees; the same for every layer of a step.

    Args:
        block_table: int64 ``(batch, blocks)``.
        current_tkv_mask: int64 ``(batch,)``: end of each sequence, in padded positions.
        left_padded_prompt_mask: int64 ``(batch,)``: padding before each sequence.
        query_length: queries of each sequence; the last of its positions.
        block_size: tokens in a block.

    Returns:
        ``kv_slots``: int64 ``(batch, longest)``, the cache row of each key. Beyond the end of a
        shorter sequence it repeats that sequence's last row, so that nothing else is ever read:
        neither block 0 nor another request's block, whatever they hold.
        ``kv_mask``: bool ``(batch, query_length, longest)``, True where a query sees a key.
    """
    lengths = current_tkv_mask - left_padded_prompt_mask
    # At least two keys: the compiler would make a graph of its own for a single one.
    keys = torch.arange(max(int(lengths.max()), 2), device=block_table.device)
    own = torch.minimum(keys, lengths.unsqueeze(1) - 1) + left_padded_prompt_mask.unsqueeze(1)
    blocks = block_table.gather(1, own // block_size)
    queries = lengths.unsqueeze(1) - query_length + torch.arange(query_length)
    return {
        "kv_slots": blocks * block_size + own % block_size,
        "kv_mask": keys <= queries.unsqueeze(2),
    }


def _store(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor | None,
    value_cache: torch.Tensor | None,
    **attn_kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    assert key_cache is not None, "paged attention needs a cache"
    assert value_cache is not None, "paged attention needs a cache"
    torch.ops.spyre_mm.paged_store(
        keys, values, key_cache, value_cache, attn_kwargs["slot_mapping"]
    )
    return key_cache, value_cache, key_cache, value_cache


def _compute(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    nheads: int,
    kvheads: int,
    p_dropout: float,
    scale_factor: float | None,
    **attn_kwargs: Any,
) -> torch.Tensor:
    scale = scale_factor if scale_factor is not None else query.shape[-1] ** -0.5
    if "kv_slots" not in attn_kwargs:
        attn_kwargs |= cpu_attention_kwargs(
            attn_kwargs["block_table"],
            attn_kwargs["current_tkv_mask"],
            attn_kwargs["left_padded_prompt_mask"],
            query.shape[1],
            key_cache.shape[1],
        )
    return torch.ops.spyre_mm.paged_attention(
        query, key_cache, value_cache, attn_kwargs["kv_slots"], attn_kwargs["kv_mask"], scale
    )


@functools.cache
def _define_ops() -> torch.library.Library:
    """Define the operators; they live as long as the returned library, which the cache keeps."""
    library = torch.library.Library("spyre_mm", "FRAGMENT")
    library.define(
        "paged_store(Tensor keys, Tensor values, Tensor(a!) key_cache, Tensor(b!) value_cache, "
        "Tensor slot_mapping) -> ()"
    )
    library.define(
        "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor kv_slots, "
        "Tensor kv_mask, float scale) -> Tensor"
    )
    library.impl("paged_store", _store_cpu, "CPU")
    library.impl("paged_store", lambda *_: None, "Meta")
    library.impl("paged_attention", _attend_cpu, "CPU")
    library.impl("paged_attention", lambda query, *_: query.new_empty(query.shape), "Meta")
    return library


def _store_cpu(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write keys and values ``(batch, length, kv_heads, head_dim)`` to their cache rows, in place.

    The caches are ``(blocks, block_size, kv_heads, head_dim)``; ``slot_mapping`` is int64
    ``(batch, length)``.
    """
    slots = slot_mapping.flatten()
    for new, cache in ((keys, key_cache), (values, value_cache)):
        cache.flatten(0, 1).index_copy_(0, slots, new.flatten(0, 1))


def _attend_cpu(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    kv_mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of ``query`` ``(batch, length, heads, head_dim)`` to the rows ``kv_slots``."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key_cache.shape[2]
    keys, values = (
        cache.flatten(0, 1)
        .index_select(0, kv_slots.flatten())
        .view(batch, -1, kv_heads, head_dim)
        .transpose(1, 2)
        for cache in (key_cache, value_cache)
    )
    # The query heads that share a KV head become rows of one head: no key is repeated.
    group = heads // kv_heads
    rows = query.reshape(batch, length, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    mask = kv_mask[:, None, None].expand(batch, 1, group, length, -1)
    attended = F.scaled_dot_product_attention(
        rows.reshape(batch, kv_heads, group * length, head_dim),
        keys,
        values,
        attn_mask=mask.reshape(batch, 1, group * length, -1),
        scale=scale,
    )
    return (
        attended.view(batch, kv_heads, group, length, head_dim)
        .permute(0, 3, 1, 2, 4)
        .reshape(batch, length, heads, head_dim)
        .contiguous()
    )

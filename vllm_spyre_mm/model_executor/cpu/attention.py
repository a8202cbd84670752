# SPDX-License-Identifier: Apache-2.0
"""Paged attention on the CPU, as FMS attention algorithms.

They take the keyword arguments of FMS's ``spyre_paged_attn`` (which the card runs, and which on a
CPU copies the whole cache at every store and loops over tokens in Python), or the arguments that
:func:`cpu_attention_kwargs` derives from them, once a step instead of once a layer.

The operators are opaque to the compiler, so that one compiled block serves every step.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F

from vllm_spyre_mm.model_executor.cpu.kernels import blocked_attention, paged_decode
from vllm_spyre_mm.model_executor.cpu.kernels.operands import PagedKV
from vllm_spyre_mm.model_executor.cpu.operators import define_operator, shape_of_first

CPU_ATTENTION = "spyre_mm_cpu_paged_attn"
"""FMS's ``attn_name`` of the algorithm that uses PyTorch's operators."""

CPU_COMPILED_ATTENTION = "spyre_mm_cpu_paged_attn_compiled"
"""FMS's ``attn_name`` of the one with kernels (:mod:`paged_decode`, :mod:`blocked_attention`)."""


@functools.cache
def register_cpu_attention() -> None:
    """Register both CPU algorithms with FMS; later calls do nothing."""
    from fms.modules.attention import register_attention_op

    define_attention()
    for name, compiled in ((CPU_ATTENTION, False), (CPU_COMPILED_ATTENTION, True)):
        register_attention_op(
            name,
            store_op=_store,
            compute_op=functools.partial(_compute, compiled=compiled),
            is_prefill_op=lambda **_: True,
        )


def cpu_attention_kwargs(
    block_table: torch.Tensor,
    current_tkv_mask: torch.Tensor,
    left_padded_prompt_mask: torch.Tensor,
    query_length: int,
    block_size: int,
) -> dict[str, torch.Tensor]:
    """Arguments of the CPU algorithms: the KV blocks and lengths of each sequence of a step.

    They are the same for every layer. A step has one query of each sequence, or several of one; its
    queries are laid out as ``(sequences, queries)`` or all in one row.

    Args:
        block_table: int64 ``(batch, blocks)``.
        current_tkv_mask: int64 ``(batch,)``: end of each sequence, in padded positions.
        left_padded_prompt_mask: int64 ``(batch,)``: padding before each sequence, whole blocks.
        query_length: queries of each sequence, at its last positions.
        block_size: tokens in a block.

    Returns:
        ``kv_blocks``: int32 ``(batch, width)``, the blocks of each sequence from the left; entries
        after them are not read.
        ``kv_lengths``: int32 ``(batch,)``, tokens of each.
        ``query_lengths``: int32 ``(batch,)``, queries of each.
    """
    padding_blocks = (left_padded_prompt_mask // block_size).unsqueeze(1)
    columns = torch.arange(block_table.shape[1]) + padding_blocks
    lengths = current_tkv_mask - left_padded_prompt_mask
    return {
        "kv_blocks": block_table.gather(1, columns.clamp(max=block_table.shape[1] - 1)).int(),
        "kv_lengths": lengths.int(),
        "query_lengths": torch.full_like(lengths, query_length, dtype=torch.int32),
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
    *,
    compiled: bool,
    **attn_kwargs: Any,
) -> torch.Tensor:
    scale = scale_factor if scale_factor is not None else query.shape[-1] ** -0.5
    if "kv_blocks" not in attn_kwargs:
        attn_kwargs |= cpu_attention_kwargs(
            attn_kwargs["block_table"],
            attn_kwargs["current_tkv_mask"],
            attn_kwargs["left_padded_prompt_mask"],
            query.shape[1],
            key_cache.shape[1],
        )
    names = ("kv_blocks", "kv_lengths", "query_lengths")
    return torch.ops.spyre_mm.paged_attention(
        query, key_cache, value_cache, *(attn_kwargs[name] for name in names), scale, compiled
    )


def define_attention() -> None:
    """Define the operators, if they are not."""
    define_operator(
        "paged_store(Tensor keys, Tensor values, Tensor(a!) key_cache, Tensor(b!) value_cache, "
        "Tensor slot_mapping) -> ()",
        CPU=paged_store,
        Meta=_no_result,
    )
    define_operator(
        "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor kv_blocks, "
        "Tensor kv_lengths, Tensor query_lengths, float scale, bool compiled) -> Tensor",
        CPU=paged_attention,
        Meta=shape_of_first,
    )


def _no_result(*_: torch.Tensor) -> None:
    """For ``Meta``: the operator returns nothing."""


def paged_store(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write keys and values ``(batch, length, kv_heads, head_dim)`` to their cache rows, in place.

    The caches are ``(blocks, block_size, kv_heads, head_dim)``; ``slot_mapping`` is int64
    ``(batch, length)``.

    Raises:
        IndexError: a cache has no such row; nothing outside of it is written.
    """
    slots = slot_mapping.flatten()
    for new, cache in ((keys, key_cache), (values, value_cache)):
        cache.flatten(0, 1).index_copy_(0, slots, new.flatten(0, 1))


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_blocks: torch.Tensor,
    kv_lengths: torch.Tensor,
    query_lengths: torch.Tensor,
    scale: float,
    compiled: bool,
) -> torch.Tensor:
    """Implements the operator ``paged_attention``; see :func:`attend_paged`."""
    kv = PagedKV(key_cache, value_cache, kv_blocks, kv_lengths)
    return attend_paged(query, kv, query_lengths, scale, compiled)


def attend_paged(
    query: torch.Tensor, kv: PagedKV, query_lengths: torch.Tensor, scale: float, compiled: bool
) -> torch.Tensor:
    """Attention of ``query`` ``(batch, length, heads, head_dim)``, in either layout of a step.

    Args:
        query: of the step.
        kv: of its sequences.
        query_lengths: int32 ``(at least sequences,)``, queries of each.
        scale: factor of the scores.
        compiled: use the C++ kernels where they support such heads.
    """
    one_each = int(query_lengths[0]) <= 1
    if one_each and compiled and paged_decode.supports(query.shape[-1], query.dtype):
        return paged_decode.paged_decode(query, kv, scale)
    rows = query.flatten(0, 1)
    if one_each:
        attended = _attend_tokens(rows, kv, scale)
    elif compiled and blocked_attention.supports(query.shape[-1], query.dtype):
        attended = blocked_attention.attend_causally(rows, kv, scale)
    else:
        attended = _attend_chunk(rows, kv, scale)
    return attended.view(query.shape)


def _attend_chunk(query: torch.Tensor, kv: PagedKV, scale: float) -> torch.Tensor:
    """Attention of the last tokens of one sequence, ``(length, heads, head_dim)``, to all of it.

    Attention to the tokens before the chunk needs no mask, that within the chunk is causal; the two
    results are merged by their log-sum-exp.
    """
    length, heads, head_dim = query.shape
    block_size, kv_heads = kv.keys.shape[1:3]
    num_keys = int(kv.lengths[0])
    group, context = heads // kv_heads, num_keys - length
    blocks = kv.blocks[0, : -(-num_keys // block_size)]
    # KV heads are the batch dimension, so that the queries of a group share one without a copy.
    queries = query.view(length, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    keys, values = (
        cache.index_select(0, blocks).flatten(0, 1).permute(1, 0, 2).unsqueeze(1)
        for cache in (kv.keys, kv.values)
    )

    def attend_range(first: int, last: int, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        shared = (part[:, :, first:last].expand(-1, group, -1, -1) for part in (keys, values))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, *shared, 0.0, causal, scale=scale
        )

    attended, log_sum = attend_range(context, num_keys, True)
    if context:
        before, log_sum_before = attend_range(0, context, False)
        share = torch.sigmoid(log_sum_before - log_sum).unsqueeze(-1)
        attended = torch.lerp(attended.float(), before.float(), share).to(query.dtype)
    return attended.permute(2, 0, 1, 3).reshape(query.shape)


def _attend_tokens(query: torch.Tensor, kv: PagedKV, scale: float) -> torch.Tensor:
    """Attention of one token of each sequence, ``(sequences, heads, head_dim)``.

    Beyond the end of a shorter sequence its last token is read again and masked, so that block 0
    and other requests' blocks, which may hold NaN, are never read. Rows of padding have length 0
    and no blocks, come last, and yield zeros.
    """
    rows = int(kv.lengths[: len(query)].count_nonzero())
    padding, query = len(query) - rows, query[:rows]
    heads, head_dim = query.shape[1:]
    block_size, kv_heads = kv.keys.shape[1:3]
    lengths = kv.lengths[:rows].long().unsqueeze(1)
    positions = torch.arange(int(lengths.max()))
    own = torch.minimum(positions, lengths - 1)
    slots = kv.blocks[:rows].gather(1, own // block_size) * block_size + own % block_size
    keys, values = (
        cache.flatten(0, 1)
        .index_select(0, slots.flatten())
        .view(rows, -1, kv_heads, head_dim)
        .transpose(1, 2)
        for cache in (kv.keys, kv.values)
    )
    # The query heads that share a KV head become rows of one head: no key is repeated.
    attended = F.scaled_dot_product_attention(
        query.view(rows, kv_heads, heads // kv_heads, head_dim),
        keys,
        values,
        attn_mask=(positions < lengths)[:, None, None],
        scale=scale,
    )
    return F.pad(attended.reshape(query.shape), (0, 0, 0, 0, 0, padding))

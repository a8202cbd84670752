# SPDX-License-Identifier: Apache-2.0
"""The compiled attention of a decode: reads the KV cache where it lies.

PyTorch's attention takes keys and values that lie side by side, and gathering those of a paged
cache costs as much as the attention of a single query. The kernel is C++ that Inductor's own
tool chain compiles, with its flags and into its cache, for the shape of one model.
"""

from collections.abc import Callable

import torch

from vllm_spyre_mm.model_executor.cpu.kernels.kernel import (
    FLOAT,
    POINTER,
    SIZE,
    Kernel,
    heads_side_by_side,
)
from vllm_spyre_mm.model_executor.cpu.tier import has_tier

LANES = 16
"""The kernel takes heads whose width is a multiple of this."""

KERNEL = Kernel(
    "paged_decode",
    ("generic", "avx512", "avx512_bf16", "amx"),
    (torch.bfloat16, torch.float32),
    (*[POINTER] * 6, SIZE, SIZE, FLOAT, *[POINTER] * 5, *[SIZE] * 5),
    SIZE,
)


def supports(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes such heads."""
    return head_dim % LANES == 0 and KERNEL.takes(dtype)


def paged_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_blocks: torch.Tensor,
    kv_lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one query of each sequence.

    Args:
        query: ``(batch, length, heads, head_dim)``, a row for each token.
        key_cache: ``(blocks, block_size, kv_heads, head_dim)``, contiguous.
        value_cache: likewise.
        kv_blocks: int32 ``(at least rows, width)``, the blocks of each sequence from the left.
        kv_lengths: int32 ``(at least rows,)``, tokens of each; 0 for padding, which yields zeros.
        scale: of the products of queries and keys.

    Returns:
        Shaped like ``query``.
    """
    _, block_size, kv_heads, head_dim = key_cache.shape
    batch, length, heads, _ = query.shape
    query = query.contiguous()
    out = torch.empty_like(query)
    kernel(head_dim, heads // kv_heads, kv_heads, block_size, query.dtype)(
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        out.data_ptr(),
        kv_blocks.data_ptr(),
        kv_lengths.data_ptr(),
        batch * length,
        kv_blocks.stride(0),
        scale,
        *[None] * 5,
        *[0] * 5,
    )
    return out


def place_and_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    position_ids: torch.Tensor,
    table: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_blocks: torch.Tensor,
    kv_lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Rotate one token of each sequence, write it to the caches, and compute its attention.

    Args:
        query: ``(1, tokens, heads, head_dim)``, not rotated.
        keys: ``(1, tokens, kv_heads, head_dim)``, likewise.
        values: likewise.
        key_cache: as for :func:`paged_decode`.
        value_cache: likewise.
        position_ids: int64 ``(1, tokens)``, contiguous.
        table: fp32 ``(positions, head_dim / 2, 2)``, contiguous: cosines and sines.
        slot_mapping: int64 ``(1, tokens)``, contiguous: the row of each token in the caches.
        kv_blocks: as for :func:`paged_decode`.
        kv_lengths: likewise; the new token is the last of each.
        scale: of the products of queries and keys.

    Returns:
        Shaped like ``query``, contiguous.

    Raises:
        IndexError: a position is not in the table, or a slot in the caches.
    """
    num_blocks, block_size, kv_heads, head_dim = key_cache.shape
    _, tokens, heads, _ = query.shape
    query, keys, values = (heads_side_by_side(part) for part in (query, keys, values))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    num_slots = num_blocks * block_size
    beyond = kernel(head_dim, heads // kv_heads, kv_heads, block_size, query.dtype)(
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        out.data_ptr(),
        kv_blocks.data_ptr(),
        kv_lengths.data_ptr(),
        tokens,
        kv_blocks.stride(0),
        scale,
        keys.data_ptr(),
        values.data_ptr(),
        position_ids.data_ptr(),
        slot_mapping.data_ptr(),
        table.data_ptr(),
        query.stride(1),
        keys.stride(1),
        values.stride(1),
        len(table),
        num_slots,
    )
    if beyond:
        raise IndexError(
            f"{beyond} tokens are beyond the model's {len(table)} positions or the {num_slots} "
            "slots of the cache"
        )
    return out


def kernel(
    head_dim: int, group: int, kv_heads: int, block_size: int, dtype: torch.dtype
) -> Callable[..., int]:
    """Compile the kernel, or find it in Inductor's cache."""
    return KERNEL.load(
        HEAD_DIM=head_dim,
        GROUP=group,
        KV_HEADS=kv_heads,
        BLOCK_SIZE=block_size,
        BF16=int(dtype == torch.bfloat16),
        BF16_PAIRS=int(_takes_pairs(head_dim, group, block_size, dtype)),
    )


def _takes_pairs(head_dim: int, group: int, block_size: int, dtype: torch.dtype) -> bool:
    """Whether such heads and blocks are multiplied by pairs of bf16 numbers, AMX's or AVX-512's."""
    fits = head_dim % 32 == 0 and group <= 16 and block_size % 64 == 0
    return fits and dtype == torch.bfloat16 and has_tier("avx512")

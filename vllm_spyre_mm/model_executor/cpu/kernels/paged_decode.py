# SPDX-License-Identifier: Apache-2.0
"""The kernel for paged attention of a decode: one query of each sequence.

PyTorch's attention needs contiguous keys and values, and gathering them from a paged cache costs as
much as the attention of a single query. The kernel reads the cache in place.
"""

from collections.abc import Callable

import torch

from vllm_spyre_mm.model_executor.cpu.kernels.kernel import (
    FLOAT,
    POINTER,
    SIZE,
    Kernel,
    with_contiguous_heads,
)
from vllm_spyre_mm.model_executor.cpu.kernels.operands import NewKV, PagedKV, RopeAngles
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
    """Whether the kernel takes such heads in this process's tier."""
    return head_dim % LANES == 0 and KERNEL.takes(dtype)


def paged_decode(query: torch.Tensor, kv: PagedKV, scale: float) -> torch.Tensor:
    """Attention of one query of each sequence; zeros for padding.

    Args:
        query: ``(batch, length, heads, head_dim)``, a row for each token.
        kv: of each sequence.
        scale: factor of the scores.

    Returns:
        Shaped like ``query``.
    """
    _, block_size, kv_heads, head_dim = kv.keys.shape
    batch, length, heads, _ = query.shape
    query = query.contiguous()
    out = torch.empty_like(query)
    load_kernel(head_dim, heads // kv_heads, kv_heads, block_size, query.dtype)(
        *_addresses(query, kv, out),
        batch * length,
        kv.blocks.stride(0),
        scale,
        *[None] * 5,
        *[0] * 5,
    )
    return out


def rope_store_decode(
    query: torch.Tensor, new: NewKV, rope: RopeAngles, kv: PagedKV, scale: float
) -> torch.Tensor:
    """Rotate one token of each sequence, write it to the KV cache, and compute its attention.

    Args:
        query: ``(1, tokens, heads, head_dim)``, not rotated.
        new: of the tokens; keys are not rotated.
        rope: of the tokens.
        kv: of each sequence; the new token is the last of each.
        scale: factor of the scores.

    Returns:
        Shaped like ``query``, contiguous.

    Raises:
        IndexError: a position is not in the table, or a slot in the cache.
    """
    num_blocks, block_size, kv_heads, head_dim = kv.keys.shape
    _, tokens, heads, _ = query.shape
    query, keys, values = map(with_contiguous_heads, (query, new.keys, new.values))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    num_slots = num_blocks * block_size
    position_ids, table = rope.addresses
    beyond = load_kernel(head_dim, heads // kv_heads, kv_heads, block_size, query.dtype)(
        *_addresses(query, kv, out),
        tokens,
        kv.blocks.stride(0),
        scale,
        keys.data_ptr(),
        values.data_ptr(),
        position_ids,
        new.slots.data_ptr(),
        table,
        query.stride(1),
        keys.stride(1),
        values.stride(1),
        rope.num_positions,
        num_slots,
    )
    if beyond:
        raise IndexError(
            f"{beyond} tokens are beyond the model's {rope.num_positions} positions or the "
            f"{num_slots} slots of the cache"
        )
    return out


def _addresses(query: torch.Tensor, kv: PagedKV, out: torch.Tensor) -> tuple[int, ...]:
    """Addresses of the kernel's first arguments."""
    return (
        *(query.data_ptr(), kv.keys.data_ptr(), kv.values.data_ptr(), out.data_ptr()),
        *(kv.blocks.data_ptr(), kv.lengths.data_ptr()),
    )


def load_kernel(
    head_dim: int, group: int, kv_heads: int, block_size: int, dtype: torch.dtype
) -> Callable[..., int]:
    """Compile the kernel for a model's shapes, or find it in Inductor's cache."""
    return KERNEL.load(
        HEAD_DIM=head_dim,
        GROUP=group,
        KV_HEADS=kv_heads,
        BLOCK_SIZE=block_size,
        BF16=int(dtype == torch.bfloat16),
        BF16_PAIRS=int(_takes_pairs(head_dim, group, block_size, dtype)),
    )


def _takes_pairs(head_dim: int, group: int, block_size: int, dtype: torch.dtype) -> bool:
    """Whether the code with dot products of bf16 pairs takes such heads and blocks."""
    fits = head_dim % 32 == 0 and group <= 16 and block_size % 64 == 0
    return fits and dtype == torch.bfloat16 and has_tier("avx512")

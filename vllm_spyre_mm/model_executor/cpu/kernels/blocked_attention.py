# SPDX-License-Identifier: Apache-2.0
"""The compiled attention of many queries: of a vision tower, and of a prompt's chunk.

PyTorch's attention keeps a bf16 matrix unit waiting: with SigLIP's 729 keys of 72 it reaches a
sixth of what a product of matrices does. The kernel pads heads and keys to whole tiles, packs them
once for hundreds of queries, and multiplies a block at a time in the L1 cache.
"""

import torch

from vllm_spyre_mm.model_executor.cpu.kernels.kernel import (
    FLOAT,
    POINTER,
    SIZE,
    Kernel,
    heads_side_by_side,
)
from vllm_spyre_mm.model_executor.cpu.memory import empty_result

KERNEL = Kernel(
    "blocked_attention",
    ("avx512", "avx512_bf16", "amx"),
    (torch.bfloat16,),
    (*[POINTER] * 5, *[SIZE] * 12, FLOAT),
)


def supports(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes such heads in this process's tier."""
    return head_dim % 2 == 0 and KERNEL.takes(dtype)


def attend_to_all(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of every position to every other, without a mask.

    Args:
        query: ``(batch, positions, heads, head_dim)``, bf16.
        keys: likewise.
        values: likewise.
        scale: of the products of queries and keys.

    Returns:
        Shaped like ``query``, contiguous.
    """
    parts = [heads_side_by_side(part) for part in (query, keys, values)]
    return _run(parts, None, 0, keys.shape[1], scale)


def attend_to_earlier(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    num_keys: int,
    scale: float,
) -> torch.Tensor:
    """Attention of the last tokens of a sequence to all before them, in a paged cache.

    Args:
        query: ``(tokens, heads, head_dim)``, bf16.
        key_cache: ``(blocks, block_size, kv_heads, head_dim)``, contiguous.
        value_cache: likewise.
        blocks: int32 ``(at least those of num_keys,)``, from the left, contiguous.
        num_keys: tokens of the sequence, the queries' own included.
        scale: of the products of queries and keys.

    Returns:
        Shaped like ``query``, contiguous.
    """
    parts = [
        heads_side_by_side(query.unsqueeze(0)),
        *(cache.flatten(0, 1).unsqueeze(0) for cache in (key_cache, value_cache)),
    ]
    return _run(parts, blocks.data_ptr(), key_cache.shape[1], num_keys, scale)[0]


def _run(
    parts: list[torch.Tensor], blocks: int | None, block_size: int, num_keys: int, scale: float
) -> torch.Tensor:
    query, keys, _ = parts
    batch, tokens, heads, head_dim = query.shape
    kv_heads = keys.shape[2]
    out = empty_result(query, query.shape)
    KERNEL.load(HEAD_DIM=head_dim)(
        *(part.data_ptr() for part in parts),
        out.data_ptr(),
        *(blocks, block_size, batch, tokens, num_keys, kv_heads, heads // kv_heads),
        *(stride for part in parts for stride in part.stride()[:2]),
        scale,
    )
    return out

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
from vllm_spyre_mm.model_executor.cpu.kernels.operands import PagedKV
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


def attend_to_earlier(query: torch.Tensor, kv: PagedKV, scale: float) -> torch.Tensor:
    """Attention of the last tokens of one sequence to all before them, and to themselves.

    Args:
        query: ``(tokens, heads, head_dim)``, bf16.
        kv: of the sequence, the first of its rows; the queries' own tokens are in it.
        scale: of the products of queries and keys.

    Returns:
        Shaped like ``query``, contiguous.
    """
    parts = [
        heads_side_by_side(query.unsqueeze(0)),
        *(cache.flatten(0, 1).unsqueeze(0) for cache in (kv.keys, kv.values)),
    ]
    return _run(parts, kv.blocks.data_ptr(), kv.keys.shape[1], int(kv.lengths[0]), scale)[0]


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

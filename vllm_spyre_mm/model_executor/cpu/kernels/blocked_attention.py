# SPDX-License-Identifier: Apache-2.0
"""The kernel for attention of many queries: of vision towers, and of a prefill chunk.

PyTorch's attention leaves a bf16 matrix unit idle: with SigLIP's 729 keys of 72 it reaches a sixth
of a GEMM's speed. The kernel, a flash attention, pads heads and keys to whole tiles, packs them
once for hundreds of queries, and multiplies a block at a time in the L1 cache.
"""

import torch

from vllm_spyre_mm.model_executor.cpu.kernels.kernel import (
    FLOAT,
    POINTER,
    SIZE,
    Kernel,
    with_contiguous_heads,
)
from vllm_spyre_mm.model_executor.cpu.kernels.operands import PagedKV, SegmentedRow
from vllm_spyre_mm.model_executor.cpu.memory import empty_result

KERNEL = Kernel(
    "blocked_attention",
    ("avx512", "avx512_bf16", "amx"),
    (torch.bfloat16,),
    (*[POINTER] * 7, *[SIZE] * 12, FLOAT),
)


def supports(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes such heads in this process's tier."""
    return head_dim % 2 == 0 and KERNEL.takes(dtype)


def attend_bidirectionally(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of every position to every other, without a mask.

    Args:
        query: ``(batch, positions, heads, head_dim)``, bf16.
        keys: likewise.
        values: likewise.
        scale: factor of the scores.

    Returns:
        Shaped like ``query``, contiguous.
    """
    parts = [with_contiguous_heads(part) for part in (query, keys, values)]
    return _run(parts, len(query), keys.shape[1], scale)


def attend_within_segments(row: SegmentedRow, scale: float) -> torch.Tensor:
    """Attention of every position of a segment to every other, after RoPE of neighbouring pairs.

    Args:
        row: in bf16.
        scale: factor of the scores.

    Returns:
        Shaped like its queries, contiguous.
    """
    parts = [with_contiguous_heads(part) for part in (row.query, row.keys, row.values)]
    within = {"segments": row.segments.data_ptr(), "angles": row.rope_table.data_ptr()}
    return _run(parts, len(row.segments) - 1, row.keys.shape[1], scale, **within)


def attend_causally(query: torch.Tensor, kv: PagedKV, scale: float) -> torch.Tensor:
    """Causal attention of the last tokens of one sequence to all of its tokens.

    Args:
        query: ``(tokens, heads, head_dim)``, bf16.
        kv: of the sequence, the first of its rows; the queries' own tokens are in it.
        scale: factor of the scores.

    Returns:
        Shaped like ``query``, contiguous.
    """
    parts = [
        with_contiguous_heads(query.unsqueeze(0)),
        *(cache.flatten(0, 1).unsqueeze(0) for cache in (kv.keys, kv.values)),
    ]
    paged = {"blocks": kv.blocks.data_ptr(), "block_size": kv.keys.shape[1]}
    return _run(parts, 1, int(kv.lengths[0]), scale, **paged)[0]


def _run(
    parts: list[torch.Tensor],
    members: int,
    num_keys: int,
    scale: float,
    *,
    blocks: int | None = None,
    block_size: int = 0,
    segments: int | None = None,
    angles: int | None = None,
) -> torch.Tensor:
    """Call the kernel for the members of a batch, or the segments of a row."""
    query, keys, _ = parts
    _, tokens, heads, head_dim = query.shape
    kv_heads = keys.shape[2]
    out = empty_result(query, query.shape)
    KERNEL.load(HEAD_DIM=head_dim)(
        *(part.data_ptr() for part in parts),
        out.data_ptr(),
        *(blocks, segments, angles),
        *(block_size, members, tokens, num_keys, kv_heads, heads // kv_heads),
        *(stride for part in parts for stride in part.stride()[:2]),
        scale,
    )
    return out

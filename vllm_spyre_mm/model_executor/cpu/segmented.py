# SPDX-License-Identifier: Apache-2.0
"""Attention within segments of a sequence: pictures, frames or windows one after the other.

Queries and keys are rotated first (RoPE of neighbouring pairs).
"""

import itertools

import torch
import torch.nn.functional as F

from vllm_spyre_mm.model_executor.cpu.kernels import blocked_attention
from vllm_spyre_mm.model_executor.cpu.kernels.operands import SegmentedRow
from vllm_spyre_mm.model_executor.cpu.operators import define_operator, shape_of_first


def attend_segments(row: SegmentedRow, scale: float) -> torch.Tensor:
    """Attention of every position of a segment to every other, without a mask over all of them.

    Args:
        row: the segments.
        scale: factor of the scores.

    Returns:
        Shaped like its queries, contiguous.
    """
    # In eager mode the C++ kernel must not be needed.
    if torch.compiler.is_compiling():
        return torch.ops.spyre_mm.segmented_attention(*row, scale)
    return _attend_with_sdpa(row, scale)


def _attend_with_sdpa(row: SegmentedRow, scale: float) -> torch.Tensor:
    """With PyTorch's attention, one call for neighbours of the same length."""
    query, keys, values, rope_table, segments = row
    query, keys = _rotate(query, rope_table), _rotate(keys, rope_table)
    result = torch.empty(query.shape, dtype=query.dtype)
    first = 0
    for length, group in itertools.groupby(segments.diff().tolist()):
        last = first + length * len(list(group))
        q, k, v = (
            part[0, first:last].unflatten(0, (-1, length)).transpose(1, 2)
            for part in (query, keys, values)
        )
        attended = F.scaled_dot_product_attention(q, k, v, scale=scale)
        result[0, first:last] = attended.transpose(1, 2).flatten(0, 1)
        first = last
    return result


def _rotate(x: torch.Tensor, rope_table: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of ``(1, positions, heads, head_dim)``, in fp32."""
    cosines, sines = rope_table.view(len(rope_table), 1, -1, 2).unbind(-1)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.stack(pairs, dim=-1).flatten(-2).to(x.dtype)


def segmented_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rope_table: torch.Tensor,
    segments: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Implements the operator: the C++ kernel where it supports such heads, else PyTorch's SDPA."""
    row = SegmentedRow(query, keys, values, rope_table, segments)
    if blocked_attention.supports(query.shape[-1], query.dtype):
        return blocked_attention.attend_within_segments(row, scale)
    return _attend_with_sdpa(row, scale)


define_operator(
    "segmented_attention(Tensor query, Tensor keys, Tensor values, Tensor rope_table, "
    "Tensor segments, float scale) -> Tensor",
    CPU=segmented_attention,
    Meta=shape_of_first,
)

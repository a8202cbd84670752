# SPDX-License-Identifier: Apache-2.0
"""Named tuples of the tensors that attention kernels take."""

from typing import NamedTuple

import torch


class PagedKV(NamedTuple):
    """The paged KV cache, and the blocks and lengths of a step's sequences in it.

    Attributes:
        keys: ``(blocks, block_size, kv_heads, head_dim)``, contiguous.
        values: likewise.
        blocks: int32 ``(at least sequences, width)``, the blocks of each sequence from the left.
        lengths: int32 ``(at least sequences,)``, tokens of each; 0 for a row of padding.
    """

    keys: torch.Tensor
    values: torch.Tensor
    blocks: torch.Tensor
    lengths: torch.Tensor


class NewKV(NamedTuple):
    """Keys and values of a step's tokens, and their slots in the KV cache.

    Attributes:
        keys: ``(1, tokens, kv_heads, head_dim)``.
        values: likewise.
        slots: int64 ``(1, tokens)``, contiguous: the row of each token in the KV cache.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor


class RopeAngles(NamedTuple):
    """Positions of a step's tokens, and RoPE's table.

    Attributes:
        position_ids: int64 ``(1, tokens)``, contiguous; None if the table is the step's own, with a
            row for each token.
        table: fp32 ``(..., positions, head_dim / 2, 2)``, contiguous: cosines and sines.
    """

    position_ids: torch.Tensor | None
    table: torch.Tensor

    @property
    def addresses(self) -> tuple[int | None, int]:
        """Of both, for a kernel."""
        given = self.position_ids
        return None if given is None else given.data_ptr(), self.table.data_ptr()

    @property
    def num_positions(self) -> int:
        """Rows of the table."""
        return self.table.shape[-3]


class SegmentedRow(NamedTuple):
    """Pictures, frames or windows one after the other, each of which attends to itself alone.

    Attributes:
        query: ``(1, positions, heads, head_dim)``.
        keys: likewise.
        values: likewise.
        rope_table: fp32 ``(positions, head_dim)``, contiguous: cosine and sine of each pair of
            neighbours in a head.
        segments: int32 ``(segments + 1,)``, contiguous: their bounds, from 0 to ``positions``.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    rope_table: torch.Tensor
    segments: torch.Tensor

# SPDX-License-Identifier: Apache-2.0
"""Tensors that the operations of attention take together."""

from typing import NamedTuple

import torch


class PagedKV(NamedTuple):
    """Keys and values of each sequence of a step, where they lie in the paged KV cache.

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
    """Keys and values of the tokens of a step, and where they go.

    Attributes:
        keys: ``(1, tokens, kv_heads, head_dim)``.
        values: likewise.
        slots: int64 ``(1, tokens)``, contiguous: the row of each token in the KV cache.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor


class RopeAngles(NamedTuple):
    """What RoPE rotates the tokens of a step by.

    Attributes:
        position_ids: int64 ``(1, tokens)``, contiguous.
        table: fp32 ``(positions, head_dim / 2, 2)``, contiguous: cosines and sines.
    """

    position_ids: torch.Tensor
    table: torch.Tensor

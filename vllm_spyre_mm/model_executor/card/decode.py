# SPDX-License-Identifier: Apache-2.0
"""The layout of a decode for the card."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class CardDecode:
    """One token of each running request, laid out for the decoder.

    Attributes:
        token_ids: int64 ``(batch, 1)``.
        position_ids: int64 ``(batch, 1)``.
        slot_mapping: int64 ``(batch, 1)``: the cache row of each token.
        block_table: int64 ``(batch, blocks)``, padded with block 0 *before* each shorter row.
        current_tkv: int64 ``(batch,)``: end of each row in padded positions.
        left_padding: int64 ``(batch,)``: padding before each row, whole blocks.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    current_tkv: torch.Tensor
    left_padding: torch.Tensor


def card_decode(
    *,
    token_ids: np.ndarray,
    num_computed: np.ndarray,
    positions: np.ndarray,
    block_rows: np.ndarray,
    block_size: int,
) -> CardDecode:
    """Lay out a decode step; no loop over requests.

    Args:
        token_ids: int ``(batch,)``, the last token of each request.
        num_computed: int ``(batch,)``, tokens of each that are in the KV cache.
        positions: int ``(batch,)``, of the tokens.
        block_rows: int ``(batch, width)``, the block ids of each, from the left.
        block_size: tokens in a block.
    """
    num_blocks = num_computed // block_size + 1
    width = int(num_blocks.max())
    padding_blocks = width - num_blocks
    columns = np.arange(width) - padding_blocks[:, None]
    rows = np.arange(len(token_ids))
    block_table = np.where(columns >= 0, block_rows[rows[:, None], columns.clip(min=0)], 0)
    slots = block_rows[rows, num_blocks - 1] * block_size + num_computed % block_size
    padding = padding_blocks * block_size

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64))

    return CardDecode(
        token_ids=tensor(token_ids)[:, None],
        position_ids=tensor(positions)[:, None],
        slot_mapping=tensor(slots)[:, None],
        block_table=tensor(block_table),
        current_tkv=tensor(padding + num_computed + 1),
        left_padding=tensor(padding),
    )

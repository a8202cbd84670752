# SPDX-License-Identifier: Apache-2.0
"""Inputs of a step for the card: chunks with their padding, and decodes of at least two rows.

The dimensions that vary between steps are marked dynamic, so that the card's compiler makes one
graph for prefill and one for decode.
"""

import numpy as np
import torch

from vllm_spyre_mm.model_executor.backend import Embed, StepInputs
from vllm_spyre_mm.model_executor.card.compile import mark_for_card
from vllm_spyre_mm.model_executor.card.decode import card_decode
from vllm_spyre_mm.model_executor.step_inputs import DecoderInputs, DecodeRows, PrefillChunk


class CardInputs(StepInputs):
    """Lays out steps for the card.

    Args:
        block_size: tokens in a block.
    """

    padded = True

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def chunk_inputs(self, chunk: PrefillChunk, embeds: torch.Tensor) -> DecoderInputs:
        """Inputs of a whole chunk of the grid, padding included."""
        # The card's attention masks padding by adding -inf, which a NaN would survive.
        embeds = embeds.masked_fill(chunk.is_padding.unsqueeze(-1), 0.0)
        for tensor in (embeds, chunk.position_ids, chunk.slot_mapping):
            mark_for_card(tensor, static=tuple(range(tensor.ndim)))
        attention = {
            "slot_mapping": chunk.slot_mapping,
            "block_table": mark_for_card(chunk.block_table, dynamic=(1,), static=(0,)),
            "current_tkv_mask": mark_for_card(chunk.current_tkv, static=(0,)),
            "left_padded_prompt_mask": mark_for_card(chunk.left_padding, static=(0,)),
        }
        # The chunk may end with padding inside its last block: logits are computed for that block.
        return DecoderInputs(embeds, chunk.position_ids, attention, last_n_tokens=self.block_size)

    def chunk_logits(self, logits: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        """Logits of the last real token, which is in the last block."""
        return logits[:, chunk.last_row]

    def decode_inputs(self, rows: DecodeRows, embed: Embed) -> DecoderInputs:
        """Inputs of a decode: a row for each request, left-padded to the longest."""
        batch = card_decode(
            token_ids=np.array(rows.token_ids),
            num_computed=np.array(rows.num_computed),
            block_rows=rows.block_rows[: len(rows.token_ids)],
            block_size=self.block_size,
            at_least=2,
        )
        embeds = mark_for_card(embed(batch.token_ids), dynamic=(0,), static=(1, 2))
        attention = {
            "slot_mapping": mark_for_card(batch.slot_mapping, dynamic=(0,), static=(1,)),
            "block_table": mark_for_card(batch.block_table, dynamic=(0, 1)),
            "current_tkv_mask": mark_for_card(batch.current_tkv, dynamic=(0,)),
            "left_padded_prompt_mask": mark_for_card(batch.left_padding, dynamic=(0,)),
        }
        position_ids = mark_for_card(batch.position_ids, dynamic=(0,), static=(1,))
        return DecoderInputs(embeds, position_ids, attention, last_n_tokens=1)

    def decode_logits(self, logits: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Logits of the requests, without those of added rows."""
        return logits[:num_rows, -1]

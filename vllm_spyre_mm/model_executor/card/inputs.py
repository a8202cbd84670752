# SPDX-License-Identifier: Apache-2.0
"""Inputs of a step for the card: chunks with their padding, and decodes.

The dimensions that vary between steps are marked dynamic, so that the card's compiler makes one
graph for prefill and one for decode.
"""

import numpy as np
import torch

from vllm_spyre_mm.model_executor.backend import Embed, StepInputs
from vllm_spyre_mm.model_executor.card.compile import card_input
from vllm_spyre_mm.model_executor.card.decode import card_decode
from vllm_spyre_mm.model_executor.step_inputs import DecoderInputs, DecodeRows, PrefillChunk


class CardInputs(StepInputs):
    """Lays out steps for the card.

    Args:
        block_size: tokens in a block.
        dynamic_chunk: whether the length of a chunk is marked as one that varies, although it
            never does.
        num_levels: levels of the model's features: a chunk always has them, zeros if need be, so
            that one graph serves every chunk.
    """

    padded = True

    def __init__(self, block_size: int, *, dynamic_chunk: bool, num_levels: int = 0) -> None:
        self.block_size = block_size
        self.dynamic_chunk = dynamic_chunk
        self.num_levels = num_levels

    def chunk_inputs(
        self, chunk: PrefillChunk, embeds: torch.Tensor, deepstack: tuple[torch.Tensor, ...] = ()
    ) -> DecoderInputs:
        """Inputs of a whole chunk of the grid, padding included."""
        # The card's attention masks padding by adding -inf, which a NaN would survive.
        embeds = embeds.masked_fill(chunk.is_padding.unsqueeze(-1), 0.0)
        attention = {
            "slot_mapping": self._by_token(chunk.slot_mapping),
            "block_table": card_input(chunk.block_table, dynamic=(1,), static=(0,)),
            "current_tkv_mask": card_input(chunk.current_tkv),
            "left_padded_prompt_mask": card_input(chunk.left_padding),
        }
        # The chunk may end with padding inside its last block: logits are computed for that block.
        last_n_tokens = self.block_size
        levels = deepstack or (torch.zeros_like(embeds),) * self.num_levels
        return DecoderInputs(
            self._by_token(embeds),
            self._by_token(self.rotated(chunk.position_ids)),
            attention,
            last_n_tokens,
            deepstack=tuple(map(self._by_token, levels)),
        )

    def _by_token(self, tensor: torch.Tensor) -> torch.Tensor:
        """An input of a chunk, ``(1, tokens, ...)``."""
        static = {*range(tensor.ndim)} - ({1} if self.dynamic_chunk else set())
        return card_input(tensor, dynamic=(1,) if self.dynamic_chunk else (), static=(*static,))

    def chunk_logits(self, logits: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        """Logits of the last real token, which is in the last block."""
        return logits[:, chunk.last_row]

    def decode_inputs(self, rows: DecodeRows, embed: Embed) -> DecoderInputs:
        """Inputs of a decode: a row for each request, left-padded to the longest."""
        batch = card_decode(
            token_ids=np.array(rows.token_ids),
            num_computed=np.array(rows.num_computed),
            positions=np.array(rows.positions),
            block_rows=rows.block_rows[: len(rows.token_ids)],
            block_size=self.block_size,
        )
        embeds = card_input(embed(batch.token_ids), dynamic=(0,), static=(1, 2))
        attention = {
            "slot_mapping": card_input(batch.slot_mapping, dynamic=(0,), static=(1,)),
            "block_table": card_input(batch.block_table, dynamic=(0, 1)),
            "current_tkv_mask": card_input(batch.current_tkv, dynamic=(0,)),
            "left_padded_prompt_mask": card_input(batch.left_padding, dynamic=(0,)),
        }
        position_ids = self.rotated(batch.position_ids.T).transpose(0, 1)
        static = (*range(1, position_ids.ndim),)
        position_ids = card_input(position_ids, dynamic=(0,), static=static)
        return DecoderInputs(embeds, position_ids, attention, last_n_tokens=1)

    def decode_logits(self, logits: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Logits of the requests: of each row the last position."""
        return logits[:, -1]

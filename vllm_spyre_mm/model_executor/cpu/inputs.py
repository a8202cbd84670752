# SPDX-License-Identifier: Apache-2.0
"""Inputs of a step on the CPU: the tokens of all its sequences in one row.

A chunk of one prompt and one token of each running request look alike to everything but attention:
a row of tokens. So one compiled graph serves both, and what tells them apart are small tensors of
fixed shape, which are updated in place.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from vllm_spyre_mm.model_executor.backend import Embed, StepInputs
from vllm_spyre_mm.model_executor.step_inputs import DecoderInputs, DecodeRows, PrefillChunk


@dataclass(frozen=True, slots=True)
class CpuDecode:
    """One token of each running request, and padding up to the least number of tokens.

    Valid until the next step: the tensors are views of memory that is used again.

    Attributes:
        token_ids: int64 ``(1, tokens)``, 0 on padding.
        position_ids: int64 ``(1, tokens)``, 0 on padding.
        attention: ``slot_mapping`` int64 ``(1, tokens)``, the cache row of each token, 0 (in
            block 0, which is nobody's) on padding; and what ``attention.cpu_attention_kwargs``
            describes, for all the rows there may be.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    attention: Mapping[str, torch.Tensor]


class CpuInputs(StepInputs):
    """Lays out steps for the CPU, in memory that is allocated once.

    Args:
        max_num_seqs: most requests that decode together.
        max_blocks: most blocks of a request.
        block_size: tokens in a block.
        least_tokens: tokens of a step at least. The compiler takes a dimension of one for a
            constant and would make a second graph; 1 where nothing is compiled.
    """

    padded = False

    def __init__(
        self, *, max_num_seqs: int, max_blocks: int, block_size: int, least_tokens: int
    ) -> None:
        rows = max(max_num_seqs, least_tokens)
        self.block_size = block_size
        self.least_tokens = least_tokens
        self._rows = np.arange(max_num_seqs)
        self._by_token = np.zeros((3, rows), dtype=np.int64)  # ids, positions, slots
        self._views: dict[int, tuple[torch.Tensor, ...]] = {}
        self._kv_lengths, self._query_lengths = np.zeros((2, rows), dtype=np.int32)
        self._lengths = {
            "kv_lengths": torch.from_numpy(self._kv_lengths),
            "query_lengths": torch.from_numpy(self._query_lengths),
        }
        self._kv_blocks = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)

    def chunk_inputs(self, chunk: PrefillChunk, embeds: torch.Tensor) -> DecoderInputs:
        """The real tokens of a chunk, and padding up to the least number of tokens."""
        length = embeds.shape[1]
        missing = max(0, self.least_tokens - length)
        pad = (0, missing)
        attention = {
            "slot_mapping": F.pad(chunk.slot_mapping, pad),
            **self.chunk_attention(
                block_ids=chunk.block_table[0].numpy(), end=int(chunk.current_tkv), length=length
            ),
        }
        return DecoderInputs(
            F.pad(embeds, (0, 0, *pad)),
            F.pad(chunk.position_ids, pad),
            attention,
            last_n_tokens=1 + missing,
        )

    def chunk_logits(self, logits: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        """The last token's, before the padding."""
        return logits[:, 0]

    def decode_inputs(self, rows: DecodeRows, embed: Embed) -> DecoderInputs:
        """One token of each request in one row."""
        step = self.decode(
            token_ids=rows.token_ids, num_computed=rows.num_computed, block_rows=rows.block_rows
        )
        return DecoderInputs(
            embed(step.token_ids), step.position_ids, step.attention, last_n_tokens=0
        )

    def decode_logits(self, logits: torch.Tensor, num_rows: int) -> torch.Tensor:
        """One request's after the other's, before the padding."""
        logits = logits[0]
        return logits if len(logits) == num_rows else logits[:num_rows]

    def decode(
        self, *, token_ids: np.ndarray, num_computed: np.ndarray, block_rows: np.ndarray
    ) -> CpuDecode:
        """Lay out one token of each request.

        Args:
            token_ids: int ``(batch,)``, the last token of each request.
            num_computed: int ``(batch,)``, tokens of each that are in the KV cache.
            block_rows: int32 ``(max_num_seqs, max_blocks)``, contiguous: the block ids of each,
                from the left. It is not copied.
        """
        batch = len(token_ids)
        tokens = max(batch, self.least_tokens)
        self._by_token[:, batch:tokens] = 0
        own_ids, positions, slots = self._by_token[:, :batch]
        own_ids[:] = token_ids
        positions[:] = num_computed
        column, offset = np.divmod(num_computed, self.block_size)
        slots[:] = block_rows[self._rows[:batch], column]
        slots *= self.block_size
        slots += offset
        np.add(num_computed, 1, out=self._kv_lengths[:batch])
        self._kv_lengths[batch:] = 0
        self._query_lengths[:] = 1
        ids_row, positions_row, slots_row = self._rows_of(tokens)
        return CpuDecode(
            token_ids=ids_row,
            position_ids=positions_row,
            attention={"slot_mapping": slots_row, **self._attention(block_rows)},
        )

    def _rows_of(self, tokens: int) -> tuple[torch.Tensor, ...]:
        """Token ids, positions and slots as ``(1, tokens)``, with the strides of such a tensor."""
        if tokens not in self._views:
            self._views[tokens] = tuple(
                torch.from_numpy(values[:tokens]).unsqueeze(0) for values in self._by_token
            )
        return self._views[tokens]

    def chunk_attention(
        self, *, block_ids: np.ndarray, end: int, length: int
    ) -> Mapping[str, torch.Tensor]:
        """What the tokens of a chunk of one prompt attend to.

        Args:
            block_ids: int ``(blocks,)``, of the prompt as far as it is computed after the chunk.
            end: position after the chunk.
            length: tokens of the chunk.
        """
        self._kv_blocks[0, : len(block_ids)] = block_ids
        for values, first in ((self._kv_lengths, end), (self._query_lengths, length)):
            values[:] = 0
            values[0] = first
        return self._attention(self._kv_blocks)

    def _attention(self, block_rows: np.ndarray) -> dict[str, torch.Tensor]:
        return {"kv_blocks": torch.from_numpy(block_rows), **self._lengths}

# SPDX-License-Identifier: Apache-2.0
"""Inputs of a step on the CPU: the tokens of all its sequences in one row.

To everything but attention a chunk of one prompt and one token of each running request look alike:
a row of tokens. So one compiled graph serves both; they differ in small tensors of fixed shape,
which are updated in place.
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
    """One token of each running request, and padding up to the minimum number of tokens.

    Valid until the next step: the tensors are views of memory that is reused.

    Attributes:
        token_ids: int64 ``(1, tokens)``, 0 on padding.
        position_ids: int64 ``(1, tokens)``, 0 on padding.
        attention: ``slot_mapping`` int64 ``(1, tokens)``, the cache row of each token, 0 (in
            block 0, which no request owns) on padding; and the arguments that
            ``attention.cpu_attention_kwargs`` describes, for the maximum number of rows.
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
        least_tokens: minimum number of tokens of a step. The compiler specialises a dimension of 1
            and would make a second graph; 1 where nothing is compiled.
    """

    padded = False

    def __init__(
        self, *, max_num_seqs: int, max_blocks: int, block_size: int, least_tokens: int
    ) -> None:
        rows = max(max_num_seqs, least_tokens)
        self.block_size = block_size
        self.least_tokens = least_tokens
        self._by_token = np.zeros((3, rows), dtype=np.int64)  # ids, positions, slots
        self._decodes: dict[int, CpuDecode] = {}  # by the number of requests
        self._block_rows = np.zeros((0, 0), dtype=np.int32)  # of those decodes
        self._num_laid_out = 0  # requests of the last step, if that was a decode
        self._kv_lengths, self._query_lengths = np.zeros((2, rows), dtype=np.int32)
        self._memory = [memoryview(values) for values in (*self._by_token, self._kv_lengths)]
        self._lengths = {
            "kv_lengths": torch.from_numpy(self._kv_lengths),
            "query_lengths": torch.from_numpy(self._query_lengths),
        }
        self._kv_blocks = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)

    def chunk_inputs(
        self, chunk: PrefillChunk, embeds: torch.Tensor, deepstack: tuple[torch.Tensor, ...] = ()
    ) -> DecoderInputs:
        """Inputs of a chunk: its real tokens, padded up to the minimum number of tokens."""
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
            self.rotated(F.pad(chunk.position_ids, pad)),
            attention,
            last_n_tokens=1 + missing,
            deepstack=tuple(F.pad(level, (0, 0, *pad)) for level in deepstack),
        )

    def chunk_logits(self, logits: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        """Logits of the last real token, which is before the padding."""
        return logits[:, 0]

    def decode_inputs(self, rows: DecodeRows, embed: Embed) -> DecoderInputs:
        """Inputs of a decode: one token of each request, all in one row."""
        step = self.decode(rows)
        return DecoderInputs(
            embed(step.token_ids),
            self.rotated(step.position_ids),
            step.attention,
            last_n_tokens=0,
        )

    def decode_logits(self, logits: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Logits of the requests, which are before the padding."""
        logits = logits[0]
        return logits if len(logits) == num_rows else logits[:num_rows]

    def decode(self, rows: DecodeRows) -> CpuDecode:
        """Lay out one token of each request; the table of blocks is not copied.

        The model has just evicted everything from the CPU's caches, so code that runs for the first
        time after it is slow: a few lines of Python a request cost less than NumPy's functions.
        """
        batch = len(rows.token_ids)
        if rows.block_rows is not self._block_rows:
            self._block_rows = rows.block_rows
            self._decodes.clear()
        if batch != self._num_laid_out:
            self._by_token[:, batch:] = 0
            self._kv_lengths[batch:] = 0
            self._query_lengths[:] = 1
            self._num_laid_out = batch
        ids, positions, slots, kv_lengths = self._memory
        requests = zip(rows.token_ids, rows.num_computed, rows.positions, rows.blocks, strict=True)
        for row, (token_id, num_computed, position, blocks) in enumerate(requests):
            column, offset = divmod(num_computed, self.block_size)
            ids[row] = token_id
            positions[row] = position
            slots[row] = blocks[column] * self.block_size + offset
            kv_lengths[row] = num_computed + 1
        if batch not in self._decodes:
            self._decodes[batch] = self._make_decode(max(batch, self.least_tokens))
        return self._decodes[batch]

    def _make_decode(self, tokens: int) -> CpuDecode:
        """A decode of so many tokens, as views of the memory that is reused."""
        ids, positions, slots = (
            torch.from_numpy(values[:tokens]).unsqueeze(0) for values in self._by_token
        )
        attention = {"slot_mapping": slots, **self._attention(self._block_rows)}
        return CpuDecode(token_ids=ids, position_ids=positions, attention=attention)

    def chunk_attention(
        self, *, block_ids: np.ndarray, end: int, length: int
    ) -> Mapping[str, torch.Tensor]:
        """Attention arguments of a chunk of one prompt.

        Args:
            block_ids: int ``(blocks,)``, of the prompt up to the end of the chunk.
            end: position after the chunk.
            length: tokens of the chunk.
        """
        self._num_laid_out = 0
        self._kv_blocks[0, : len(block_ids)] = block_ids
        for values, first in ((self._kv_lengths, end), (self._query_lengths, length)):
            values[:] = 0
            values[0] = first
        return self._attention(self._kv_blocks)

    def _attention(self, block_rows: np.ndarray) -> dict[str, torch.Tensor]:
        return {"kv_blocks": torch.from_numpy(block_rows), **self._lengths}

# SPDX-License-Identifier: Apache-2.0
"""The steps of a worker for a decoder alone, on any backend."""

from pathlib import Path

import numpy as np
import torch

from vllm_spyre_mm.model_executor.backend import Backend, StepSizes, WarmupWork
from vllm_spyre_mm.model_executor.kv_cache import allocate_kv_cache
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.model_executor.model import SpyreModel
from vllm_spyre_mm.model_executor.step_inputs import DecodeRows
from vllm_spyre_mm.multimodal.merge import TEXT
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils
from vllm_spyre_mm.scheduler.geometry import Geometry
from vllm_spyre_mm.worker.prefill import prefill_chunk

BLOCK, CHUNK, MAX_BLOCKS = 64, 128, 4
SIZES = StepSizes(
    block_size=BLOCK,
    chunk_size=CHUNK,
    context_len=MAX_BLOCKS * BLOCK,
    max_batch_tkv=1024,
    max_num_seqs=3,
    max_blocks=MAX_BLOCKS,
)
GEOMETRY = Geometry(BLOCK, CHUNK, MAX_BLOCKS * BLOCK)


class Served:
    """A model on a backend, warmed up.

    Args:
        mapping: of the model.
        checkpoint: of a text model.
        backend: made for :data:`SIZES`.
        dtype: of the decoder.
    """

    def __init__(
        self, mapping: MMUtils, checkpoint: Path, backend: Backend, dtype: torch.dtype
    ) -> None:
        backend.prepare()
        options = LoadOptions(dtype, dtype, for_card=backend.for_card)
        self.model = SpyreModel(load_model(mapping, checkpoint, options), mapping, backend)
        with backend.without_gradients():
            cache = mapping.kv_cache_options(backend.for_card)
            self.model.kv_cache = allocate_kv_cache(cache, 12, BLOCK, dtype, 1)
        self.inputs = backend.inputs
        self.model.compile()
        for each in self.model.warmup_passes():
            with each.context:
                if each.work is not WarmupWork.ENCODER:
                    self.chunk([*range(10, 30)], 0, 20, [1], None)
                    self.decode(DecodeRows([30], [20], [20], [[1]], table([[1]])))

    def chunk(
        self,
        token_ids: list[int],
        start: int,
        end: int,
        blocks: list[int],
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits of the last token of a chunk of a prompt, ``(1, vocab_size)``."""
        chunk = prefill_chunk(
            token_ids=token_ids[start:end],
            start=start,
            num_tokens=len(token_ids),
            blocks=blocks,
            feature_index=np.full(end - start, TEXT),
            positions=None if positions is None else positions[:, start:end].numpy(),
            geometry=GEOMETRY,
            padded=self.inputs.padded,
        )
        with self.model.backend.without_gradients():
            inputs = self.inputs.chunk_inputs(chunk, self.model.embed(chunk.token_ids))
            return self.inputs.chunk_logits(self.model.forward(inputs), chunk)

    def decode(self, rows: DecodeRows) -> torch.Tensor:
        """Logits of a token of each row, ``(rows, vocab_size)``."""
        with self.model.backend.without_gradients():
            inputs = self.inputs.decode_inputs(rows, self.model.embed)
            return self.inputs.decode_logits(self.model.forward(inputs), len(rows.token_ids))


def table(blocks: list[list[int]]) -> np.ndarray:
    """vLLM's table of blocks, of one shape whatever the number of rows."""
    rows = np.zeros((SIZES.max_num_seqs, MAX_BLOCKS), dtype=np.int32)
    for row, own in enumerate(blocks):
        rows[row, : len(own)] = own
    return rows

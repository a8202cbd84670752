# SPDX-License-Identifier: Apache-2.0
"""How a step is laid out for what runs the decoder: the interface, and the choice."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_spyre_mm.model_executor.card.inputs import CardSteps
from vllm_spyre_mm.model_executor.cpu.inputs import HostSteps
from vllm_spyre_mm.model_executor.model import DecoderInputs
from vllm_spyre_mm.scheduler.geometry import Geometry
from vllm_spyre_mm.worker.batch import DecodeRows
from vllm_spyre_mm.worker.prefill import PrefillChunk

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_spyre_mm.config import Backend

Embed = Callable[[torch.Tensor], torch.Tensor]
"""Text embeddings ``(batch, tokens, hidden_size)`` of token ids ``(batch, tokens)``."""


class Steps(Protocol):
    """Lays out a chunk and a decode, and finds the logits that are wanted.

    Attributes:
        padded: whether a chunk is laid out with its padding.
    """

    padded: bool

    def chunk_inputs(self, chunk: PrefillChunk, embeds: torch.Tensor) -> DecoderInputs:
        """A chunk of one prompt, given its merged embeddings ``(1, tokens, hidden_size)``."""

    def chunk_logits(self, logits: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        """Of what the decoder gave for a chunk, those of its last token: ``(1, vocab_size)``."""

    def decode_inputs(self, rows: DecodeRows, embed: Embed) -> DecoderInputs:
        """One token of each running request."""

    def decode_logits(self, logits: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Of what the decoder gave for a decode, those of the rows: ``(num_rows, vocab_size)``."""


def steps_for(backend: "Backend", geometry: Geometry, vllm_config: "VllmConfig") -> Steps:
    """The layout that a backend runs."""
    if backend == "sendnn":
        return CardSteps(geometry.block_size)
    return HostSteps(
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_blocks=geometry.num_blocks(vllm_config.model_config.max_model_len),
        block_size=geometry.block_size,
        least_tokens=2 if backend == "inductor" else 1,
    )

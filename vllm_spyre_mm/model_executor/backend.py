# SPDX-License-Identifier: Apache-2.0
"""What executes the decoder: the contract of a backend. ``cpu`` and ``card`` implement it.

The vision encoder runs on the host whatever the backend; a backend places and compiles it too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from vllm_spyre_mm.model_executor.kv_cache import KVCache
from vllm_spyre_mm.model_executor.spec import FmsModel, LoadOverrides, ModelSpec
from vllm_spyre_mm.model_executor.step_inputs import DecoderInputs, DecodeRows, PrefillChunk

Embed = Callable[[torch.Tensor], torch.Tensor]
"""Text embeddings ``(batch, tokens, hidden_size)`` of token ids ``(batch, tokens)``."""


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Bounds of the steps that an engine runs, in tokens unless it says otherwise.

    Attributes:
        block_size: of a block of the KV cache.
        chunk_size: of a prefill chunk.
        context_len: of the longest sequence, with its padding to whole chunks.
        max_batch_tkv: of batch × padded length of a decode.
        max_num_seqs: sequences that decode together.
        max_blocks: blocks of a sequence.
    """

    block_size: int
    chunk_size: int
    context_len: int
    max_batch_tkv: int
    max_num_seqs: int
    max_blocks: int


class StepInputs(ABC):
    """Lays out a chunk and a decode, and finds the logits that are wanted.

    Attributes:
        padded: whether a chunk is laid out with its padding.
    """

    padded: bool

    @abstractmethod
    def chunk_inputs(self, chunk: PrefillChunk, embeds: torch.Tensor) -> DecoderInputs:
        """A chunk of one prompt, given its merged embeddings ``(1, tokens, hidden_size)``."""

    @abstractmethod
    def chunk_logits(self, logits: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        """Of what the decoder gave for a chunk, those of its last token: ``(1, vocab_size)``."""

    @abstractmethod
    def decode_inputs(self, rows: DecodeRows, embed: Embed) -> DecoderInputs:
        """One token of each running request."""

    @abstractmethod
    def decode_logits(self, logits: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Of what the decoder gave for a decode, those of the rows: ``(num_rows, vocab_size)``."""


class Backend(ABC):
    """Executes one model's decoder, and its vision encoder on the host.

    Called in this order: :meth:`prepare` before the model is loaded, :meth:`place` once it is,
    :meth:`compile`, the passes of :meth:`warmup_passes`, then :meth:`forward` for each step.

    Attributes:
        for_card: whether the decoder is loaded as the card's compiler wants it.
        inputs: the layout of its steps.
    """

    for_card: bool
    inputs: StepInputs

    @abstractmethod
    def prepare(self) -> None:
        """Set, or begin, what must be there before the model is; runs in the worker's process."""

    @abstractmethod
    def place(self, model: FmsModel, overrides: LoadOverrides) -> None:
        """Take a loaded model: replace layers, in place, by what is fast here."""

    @abstractmethod
    def compile(self, model: FmsModel, overrides: LoadOverrides) -> None:
        """Wrap what is to be compiled; each graph is made at its first run, in the warmup."""

    @abstractmethod
    def warmup_passes(
        self, spec: ModelSpec, kv_cache: KVCache
    ) -> Iterator[tuple[str, AbstractContextManager[None]]]:
        """How often the warmup's requests run: a title for each pass, and its context."""

    @abstractmethod
    def forward(self, inputs: DecoderInputs, kv_cache: KVCache) -> tuple[torch.Tensor, KVCache]:
        """Run the decoder and write to its KV cache.

        Returns:
            Logits of the last positions, ``(batch, last_n_tokens or length, vocab_size)``, and the
            cache of the next step.
        """

# SPDX-License-Identifier: Apache-2.0
"""The interface of a backend, which runs the decoder; ``cpu`` and ``card`` implement it.

The vision encoder runs on the host with every backend, which places and compiles it too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, auto

import torch

from vllm_spyre_mm.model_executor.kv_cache import KVCache
from vllm_spyre_mm.model_executor.spec import FmsModel, LoadOverrides, ModelSpec
from vllm_spyre_mm.model_executor.step_inputs import DecoderInputs, DecodeRows, PrefillChunk

Embed = Callable[[torch.Tensor], torch.Tensor]
"""Maps token ids ``(batch, tokens)`` to text embeddings ``(batch, tokens, hidden_size)``."""


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Upper bounds of the steps that an engine runs.

    Attributes:
        block_size: tokens in a block of the KV cache.
        chunk_size: tokens in a prefill chunk.
        context_len: tokens of the longest sequence, padded to whole chunks.
        max_batch_tkv: batch × padded length of a decode, in tokens.
        max_num_seqs: sequences that decode together.
        max_blocks: blocks of a sequence.
    """

    block_size: int
    chunk_size: int
    context_len: int
    max_batch_tkv: int
    max_num_seqs: int
    max_blocks: int


class WarmupWork(Enum):
    """What is run in a pass of the warmup.

    Attributes:
        REQUESTS: dummy requests from their pictures to their tokens.
        ENCODER: the vision encoder on their pictures.
        GRAPHS: the decoder alone, on one chunk and one decode.
    """

    REQUESTS = auto()
    ENCODER = auto()
    GRAPHS = auto()


@dataclass(frozen=True, slots=True)
class WarmupPass:
    """One pass of the warmup.

    Attributes:
        title: shown while it runs.
        work: what is run.
        context: in which it is.
    """

    title: str
    work: WarmupWork
    context: AbstractContextManager[None]


class StepInputs(ABC):
    """Lays out a prefill chunk or a decode for the decoder, and picks the logits to sample from.

    Attributes:
        padded: whether chunks include their padding.
        rotate: makes what the decoder takes in place of positions, of int64 ``(axes, tokens)``:
            ``(1, tokens, ...)``; None if it takes positions. Set by the backend.
    """

    padded: bool
    rotate: Callable[[torch.Tensor], torch.Tensor] | None = None

    def rotated(self, position_ids: torch.Tensor) -> torch.Tensor:
        """What the decoder takes of int64 ``(axes, tokens)``: those, or ``(1, tokens, ...)``."""
        return position_ids if self.rotate is None else self.rotate(position_ids)

    @abstractmethod
    def chunk_inputs(
        self, chunk: PrefillChunk, embeds: torch.Tensor, deepstack: tuple[torch.Tensor, ...] = ()
    ) -> DecoderInputs:
        """Inputs of a chunk of one prompt.

        Args:
            chunk: the chunk.
            embeds: its embeddings ``(1, tokens, hidden_size)``.
            deepstack: levels of its features, each like ``embeds``; empty for a chunk without
                features, and for a model without levels.
        """

    @abstractmethod
    def chunk_logits(self, logits: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        """The last token's logits ``(1, vocab_size)``, of the decoder's logits for a chunk."""

    @abstractmethod
    def decode_inputs(self, rows: DecodeRows, embed: Embed) -> DecoderInputs:
        """Inputs of a decode: one token of each running request."""

    @abstractmethod
    def decode_logits(self, logits: torch.Tensor, num_rows: int) -> torch.Tensor:
        """The rows' logits ``(num_rows, vocab_size)``, of the decoder's logits for a decode."""


class Backend(ABC):
    """Runs one model's decoder, and its vision encoder on the host.

    Called in this order: :meth:`prepare` before the model is loaded, :meth:`place` once it is,
    :meth:`compile`, the passes of :meth:`warmup_passes`, then :meth:`forward` for each step.

    Attributes:
        for_card: whether the decoder is loaded in the form that the card's compiler requires.
        inputs: lays out its steps.
    """

    for_card: bool
    inputs: StepInputs

    @abstractmethod
    def without_gradients(self) -> AbstractContextManager[None]:
        """The context in which steps run and the KV cache is made.

        A compiler tells tensors of ``inference_mode`` from others: all of them are of one kind.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Prepare the worker's process before the model is loaded."""

    @abstractmethod
    def place(self, model: FmsModel, overrides: LoadOverrides) -> None:
        """Take a loaded model and replace layers by faster ones, in place."""

    @abstractmethod
    def compile(self, model: FmsModel, overrides: LoadOverrides) -> None:
        """Wrap modules for compilation; each graph is compiled at its first run, in the warmup."""

    @abstractmethod
    def warmup_passes(self, spec: ModelSpec, kv_cache: KVCache) -> Iterator[WarmupPass]:
        """The passes of the warmup, in their order.

        Args:
            spec: of the model.
            kv_cache: of the decoder; empty if only the encoder is loaded.
        """

    @abstractmethod
    def forward(self, inputs: DecoderInputs, kv_cache: KVCache) -> tuple[torch.Tensor, KVCache]:
        """Run the decoder and write to its KV cache.

        Returns:
            Logits of the last positions, ``(batch, last_n_tokens or length, vocab_size)``, and the
            cache of the next step.
        """

# SPDX-License-Identifier: Apache-2.0
"""The model as the runner uses it: embed, encode and forward, on any backend."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch

from vllm_spyre_mm.model_executor.backend import Backend, WarmupPass
from vllm_spyre_mm.model_executor.kv_cache import KVCache
from vllm_spyre_mm.model_executor.parts import ModelPart, overrides_of
from vllm_spyre_mm.model_executor.pieces import Pieces, whole
from vllm_spyre_mm.model_executor.spec import FmsModel, ModelSpec
from vllm_spyre_mm.model_executor.step_inputs import DecoderInputs

Spec = TypeVar("Spec", bound=ModelSpec)
Features = Pieces[list[torch.Tensor]]


class SpyreModel(Generic[Spec]):
    """An FMS model with its mapping, placed for one backend.

    Args:
        fms_model: as ``loader.load_model`` returns it; the backend replaces layers of it.
        mapping: of its architecture.
        backend: runs the decoder.
        part: what was loaded of it.

    Attributes:
        kv_cache: of the decoder; allocated by the worker.
        watch: what the worker puts around encoding in pieces, to notice one that hangs.
    """

    def __init__(
        self,
        fms_model: FmsModel,
        mapping: Spec,
        backend: Backend,
        part: ModelPart = ModelPart.WHOLE,
    ) -> None:
        self.fms_model = fms_model
        self.mapping = mapping
        self.backend = backend
        self.part = part
        self.kv_cache: KVCache = []
        self.watch: Callable[[Features], Features] = lambda pieces: pieces
        # The fields used here are the same for the card.
        self._overrides = overrides_of(mapping.load_overrides(), part)
        backend.place(fms_model, self._overrides)

    def compile(self) -> None:
        """Wrap modules for compilation; each graph is compiled at its first run, in the warmup."""
        self.backend.compile(self.fms_model, self._overrides)

    def warmup_passes(self) -> Iterator[WarmupPass]:
        """The passes of the warmup; the KV cache has to be allocated."""
        return self.backend.warmup_passes(self.mapping, self.kv_cache)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Text embeddings ``(batch, length, hidden_size)`` of int64 ``(batch, length)``."""
        return self.mapping.embed_tokens(self.fms_model, token_ids)

    def encode(self, mm_kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Features of each image, ``(num_features, hidden_size)``, in the encoder's dtype."""
        return whole(self.encode_pieces(mm_kwargs))

    def encode_pieces(self, mm_kwargs: Mapping[str, Any]) -> Pieces[list[torch.Tensor]]:
        """As :meth:`encode`, in pieces: yields after each layer of the encoder."""
        return self.watch(self.mapping.feature_pieces(self.fms_model, mm_kwargs))

    def forward(self, inputs: DecoderInputs) -> torch.Tensor:
        """Run the decoder and write to its KV cache.

        Returns:
            Logits of the last positions, ``(batch, last_n_tokens or length, vocab_size)``.
        """
        logits, self.kv_cache = self.backend.forward(inputs, self.kv_cache)
        return logits

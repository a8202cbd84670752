# SPDX-License-Identifier: Apache-2.0
"""What a mapping says about a model, as far as the model is loaded, cached and run by it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

FmsModel = Any
"""An FMS model: a module whose parts are reached by the names that its mapping knows."""


@dataclass(frozen=True, slots=True)
class KVCacheOptions:
    """Shape of the decoder's KV cache, before tensor parallelism.

    Attributes:
        num_layers: decoder layers.
        num_kv_heads: KV heads of a layer.
        head_dim: width of a head in the cache.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a decoder, which may share its weights with the embedding.

    Attributes:
        name: of its weight, renamed.
        embedding: of the embedding's weight, renamed.
        tied: whether the configuration says that they are one.
        untied_config: the FMS configuration with a head of its own, for a checkpoint that holds
            two different tensors all the same.
        settings: what the configuration says, for messages.
    """

    name: str
    embedding: str
    tied: bool
    untied_config: Any
    settings: str


@dataclass(frozen=True, slots=True)
class LoadOverrides:
    """How a checkpoint of this architecture is loaded.

    Attributes:
        architecture: name of the FMS architecture, whose adapter reads the checkpoint.
        model_class: the FMS model; made from ``config`` and ``distributed_strategy``.
        config: its configuration.
        rename: a checkpoint's tensor name in the one layout that FMS's adapter knows.
        is_unused: whether a tensor, by its renamed name, has no part in the computation.
        head: the decoder's head. A checkpoint may leave a tied one out.
        encoder_modules: names of the FMS model's modules and parameters that make up the vision
            encoder: they run on the host, in the encoder's dtype.
        encoder_blocks: the repeated blocks of the vision encoder, compiled once for all.
        decoder_blocks: the repeated blocks of the decoder.
    """

    architecture: str
    model_class: Callable[..., nn.Module]
    config: Any
    rename: Callable[[str], str]
    is_unused: Callable[[str], bool]
    head: Head
    encoder_modules: tuple[str, ...]
    encoder_blocks: Callable[[FmsModel], nn.ModuleList]
    decoder_blocks: Callable[[FmsModel], nn.ModuleList]


class ModelSpec(Protocol):
    """The part of a mapping that the model executor uses; ``mm_mappings.base.MMUtils`` has it."""

    @property
    def text_config(self) -> Any:
        """The decoder's Transformers configuration."""

    @property
    def encoder_head_dim(self) -> int | None:
        """Width of a head of the vision encoder; None without an encoder."""

    def kv_cache_options(self, for_card: bool = False) -> KVCacheOptions:
        """Shape of the KV cache."""

    def load_overrides(self, for_card: bool = False) -> LoadOverrides:
        """How to load a checkpoint."""

    def embed_tokens(self, model: FmsModel, token_ids: torch.Tensor) -> torch.Tensor:
        """Text embeddings ``(batch, length, hidden_size)`` of int64 ``(batch, length)``."""

    def compute_features(self, model: FmsModel, mm_kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Features of each image, ``(num_features, hidden_size)``, in the encoder's dtype."""

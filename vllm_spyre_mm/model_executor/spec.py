# SPDX-License-Identifier: Apache-2.0
"""The part of a mapping that the model executor uses: how to load, cache and run the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from vllm_spyre_mm.model_executor.pieces import Pieces

FmsModel = Any
"""An FMS model; its mapping knows the names of its submodules."""


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
class LMHead:
    """The LM head of a decoder, which may be tied to the text embedding.

    Attributes:
        name: renamed name of its weight.
        embedding: renamed name of the embedding's weight.
        tied: whether the configuration ties them.
        untied_config: the FMS configuration with an untied head, for a checkpoint whose two tensors
            differ although the configuration ties them.
        settings: the configuration's settings in words, for messages.
    """

    name: str
    embedding: str
    tied: bool
    untied_config: Any
    settings: str


class StoredLayout(Protocol):
    """How weights in a format of their own become those of the Hugging Face layout."""

    def rename(self, name: str) -> str:
        """The name that FMS's adapter knows."""

    def convert(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor, by its renamed name, with its rows in the order of that layout."""


@dataclass(frozen=True, slots=True)
class LoadOverrides:
    """How a checkpoint of this architecture is loaded.

    Attributes:
        architecture: name of the FMS architecture, whose adapter reads the checkpoint.
        model_class: the FMS model; made from ``config`` and ``distributed_strategy``.
        config: its configuration.
        rename: maps a checkpoint's tensor name to the one that FMS's adapter knows.
        is_unused: whether a tensor, by its renamed name, has no part in the computation.
        head: the LM head. A checkpoint may leave a tied one out.
        encoder_modules: names of the FMS model's modules and parameters that make up the vision
            encoder: they run on the host, in the encoder's dtype.
        encoder_blocks: the repeated blocks of the vision encoder, which share one graph.
        decoder_blocks: the repeated blocks of the decoder.
        deepstack_levels: levels of the image features that are added in the decoder.
        mistral_layout: how weights in Mistral's own format are read; None for other models.
    """

    architecture: str
    model_class: Callable[..., nn.Module]
    config: Any
    rename: Callable[[str], str]
    is_unused: Callable[[str], bool]
    head: LMHead
    encoder_modules: tuple[str, ...]
    encoder_blocks: Callable[[FmsModel], nn.ModuleList]
    decoder_blocks: Callable[[FmsModel], nn.ModuleList]
    deepstack_levels: int = 0
    mistral_layout: "StoredLayout | None" = None


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

    def feature_pieces(
        self, model: FmsModel, mm_kwargs: Mapping[str, Any]
    ) -> Pieces[list[torch.Tensor]]:
        """Features of each image, ``(num_features, hidden_size)``, in the encoder's dtype."""

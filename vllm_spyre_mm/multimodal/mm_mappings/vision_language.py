# SPDX-License-Identifier: Apache-2.0
"""The base class of the mappings whose model has a vision tower before its decoder."""

import dataclasses
import re
from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from vllm_spyre_mm.model_executor.models.composition import (
    DECODER,
    PROJECTOR,
    TOWER,
    CompositionConfig,
)
from vllm_spyre_mm.model_executor.models.decoders import DECODERS, decoder_mismatch
from vllm_spyre_mm.model_executor.models.towers import TOWERS, tower_mismatch
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.model_executor.spec import FmsModel, LoadOverrides
from vllm_spyre_mm.multimodal.mm_mappings.decoder import DecoderMapping

TILE_TOWERS = ("siglip_vision_model", "clip_vision_model")
"""Towers that encode square tiles of one size."""

PATCHES_AT_ONCE = 3000
"""Patches that go through the tower together, of four tiles in Granite Vision: enough rows for full
speed, and activations (25 MB in a layer) that the allocator gives out again rather than back."""


class VisionLanguageMapping(DecoderMapping):
    """A composition with a vision tower."""

    @property
    def encoder_summary(self) -> str:
        vision = self.hf_config.vision_config
        return (
            f"{vision.model_type}, {max(self.feature_layers)} of {vision.num_hidden_layers} "
            f"layers, images of {vision.image_size} in patches of {vision.patch_size}"
        )

    @property
    def image_token_id(self) -> int:
        return self.hf_config.image_token_index

    @property
    def tie_settings(self) -> str:
        """Both settings; the text part's has no effect."""
        text = self.text_config.tie_word_embeddings
        return (
            f"{super().tie_settings} at the top of config.json, where Transformers looks, and "
            f"text_config.tie_word_embeddings is {text}"
        )

    @property
    def feature_layers(self) -> list[int]:
        """Indices of the hidden states that make the features; 0 is the embeddings'."""
        num_states = self.hf_config.vision_config.num_hidden_layers + 1
        return [range(num_states)[i] for i in feature_layers_of(self.hf_config)]

    @abstractmethod
    def projector(self, config: Any) -> nn.Module:
        """Make the FMS module that projects hidden states to features."""

    def composition(self, for_card: bool) -> CompositionConfig:
        hf_config = self.hf_config
        tower = TOWERS[hf_config.vision_config.model_type]
        # Layers above the last one used are not built. Indices from the front stay valid in the
        # shorter tower.
        layers = self.feature_layers
        config = super().composition(for_card)
        config.tower = tower
        config.vision_config = tower.config(hf_config.vision_config, max(layers))
        config.projector = self.projector
        config.vision_feature_layer = layers if len(layers) > 1 else layers[0]
        for name in ("projector_hidden_act", "multimodal_projector_bias"):
            if hasattr(hf_config, name):  # not every projector leaves the choice
                setattr(config, name, getattr(hf_config, name))
        return config

    def encode_tiles(self, model: FmsModel, pixels: torch.Tensor) -> Pieces[torch.Tensor]:
        """Features ``(tiles, patches, hidden_size)`` of ``(tiles, channels, side, side)``."""
        features = []
        for part in self.parts(pixels):
            features.append((yield from self.encode_part(model, part)))
        return torch.cat(features)

    def parts(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tiles ``(tiles, channels, side, side)`` in parts that are encoded together.

        A few tiles at a time, so that memory does not grow with their number. The parts are of
        nearly the same size, with two tiles at least, as every image has: parts of up to two would
        leave one of three alone.
        """
        vision = self.hf_config.vision_config
        at_once = max(3, PATCHES_AT_ONCE // (vision.image_size // vision.patch_size) ** 2)
        return pixels.tensor_split(-(-len(pixels) // at_once))

    def encode_part(self, model: FmsModel, pixels: torch.Tensor) -> Pieces[torch.Tensor]:
        """Features ``(tiles, patches, hidden_size)`` of the tiles of one part."""
        states = yield from model.select_hidden_states(pixels)
        features: torch.Tensor = model.multi_modal_projector(states)
        return features

    def load_overrides(self, for_card: bool = False) -> LoadOverrides:
        tower = TOWERS[self.hf_config.vision_config.model_type]
        return dataclasses.replace(
            super().load_overrides(for_card),
            encoder_modules=(TOWER, PROJECTOR),
            encoder_blocks=lambda model: tower.blocks[0](model.vision_tower),
        )

    def rename(self, name: str) -> str:
        # Transformers 4.52 put everything but the head below "model."; Transformers 5 dropped
        # "vision_model." inside the tower.
        inner = TOWERS[self.hf_config.vision_config.model_type].inner
        name = name.removeprefix("model.")
        name = re.sub(r"^lm_head\.", f"{DECODER}.lm_head.", name)
        name = re.sub(rf"^{TOWER}\.(?!{re.escape(inner)})", f"{TOWER}.{inner}", name)
        return re.sub(rf"^{DECODER}\.(?!model\.|lm_head\.)", f"{DECODER}.model.", name)

    def is_unused(self, name: str) -> bool:
        """Whether a tensor is unused: also the tower's pooling, and layers above the last used."""
        tower = TOWERS[self.hf_config.vision_config.model_type]
        beginning = f"{TOWER}.{tower.inner}"
        if name.startswith(tuple(f"{beginning}{unused}" for unused in tower.unused)):
            return True
        layer = re.match(rf"{re.escape(beginning + tower.blocks[1])}(\d+)\.", name)
        if layer is not None:
            return int(layer[1]) >= max(self.feature_layers)
        return super().is_unused(name)


def feature_layers_of(config: Any) -> list[int]:
    """The hidden states that make the features, as a configuration counts them."""
    layers = config.vision_feature_layer
    return [layers] if isinstance(layers, int) else list(layers)


def first_mismatch(
    config: Any, towers: tuple[str, ...], decoders: tuple[str, ...] = tuple(DECODERS)
) -> str | None:
    """First property of a tower, its projector or a decoder that would not be honoured, or None.

    Args:
        config: the Transformers configuration of the whole model.
        towers: ``model_type`` of the towers that are possible.
        decoders: ``model_type`` of the decoders that are possible.
    """
    mismatch = kind_mismatch(config, towers, decoders)
    if mismatch is not None:
        return mismatch
    if config.projector_hidden_act != "gelu":
        return f"projector_hidden_act {config.projector_hidden_act!r} is not implemented"
    if not feature_layers_of(config):
        return "vision_feature_layer is empty"
    return tower_mismatch(config.vision_config, feature_layers_of(config)) or decoder_mismatch(
        config.text_config
    )


def kind_mismatch(
    config: Any, towers: tuple[str, ...], decoders: tuple[str, ...] = tuple(DECODERS)
) -> str | None:
    """Why a tower or a decoder is of another kind than those that are possible, or None."""
    for name, possible in (("vision_config", towers), ("text_config", decoders)):
        model_type = getattr(config, name).model_type
        if model_type not in possible:
            implemented = ", ".join(possible)
            return f"{name}.model_type {model_type!r} is not implemented, only {implemented}"
    return None


def select_mismatch(config: Any) -> str | None:
    """Why ``vision_feature_select_strategy`` would not be honoured, or None.

    ``default`` leaves the first position out, which is a class token or, in a tower without one,
    a patch.
    """
    strategy = config.vision_feature_select_strategy
    if strategy not in ("default", "full"):
        return f"vision_feature_select_strategy {strategy!r} is not implemented"
    class_token = TOWERS[config.vision_config.model_type].class_token
    if strategy == "default" and not class_token:
        return "vision_feature_select_strategy is 'default', but the tower has no class token"
    return None

# SPDX-License-Identifier: Apache-2.0
"""Granite Vision 4: LLaVA-Next's tiles, whose features are levels for several decoder layers."""

import re
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import nn

from vllm_spyre_mm.model_executor.models.composition import PROJECTOR, CompositionConfig
from vllm_spyre_mm.model_executor.models.decoders import decoder_mismatch, width_mismatch
from vllm_spyre_mm.model_executor.models.names import renamed
from vllm_spyre_mm.model_executor.models.towers import tower_mismatch
from vllm_spyre_mm.model_executor.models.window_qformer import (
    SHRINK,
    Level,
    LevelProjector,
    WindowQFormerConfig,
)
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.model_executor.spec import FmsModel
from vllm_spyre_mm.multimodal.merge import TEXT, merge_levels
from vllm_spyre_mm.multimodal.mm_mappings.decoder import as_text_model
from vllm_spyre_mm.multimodal.mm_mappings.llava_next import LlavaNext, pinpoint_mismatch
from vllm_spyre_mm.multimodal.mm_mappings.vision_language import (
    kind_mismatch,
    select_mismatch,
)

TEXT_MODEL, GRANITES = "granite4_vision_text", ("granite", "granitemoehybrid")
"""``model_type`` of its own decoder, and of text models that the same computation is known as."""

CORNERS = SHRINK**2
"""Spatial levels: one for each patch of a square of two by two."""

NAMES = (
    (r"^layerwise_projectors\.", f"{PROJECTOR}.levels."),
    (r"\.qformer\.layernorm\.", ".layernorm."),
    (r"\.qformer\.encoder\.layer\.", ".layers."),
    (r"(attention)\.attention\.", r"\1."),
    (r"(attention)\.output\.dense\.", r"\1.dense."),
    (r"(attention)\.output\.LayerNorm\.", r"\1.norm."),
    (r"\.intermediate_query\.dense\.", ".feed_forward.w1."),
    (r"\.output_query\.dense\.", ".feed_forward.w2."),
    (r"\.output_query\.LayerNorm\.", ".norm."),
)
"""The names of a projector's parts in a checkpoint, and here."""


class Granite4Vision(LlavaNext):
    """Granite Vision 4.

    A tile's patches become features in windows, several times: from several hidden states of the
    tower, and from its last one with each patch of a square as the start. These *levels* lie side
    by side in a feature, and each is added before the input of a decoder layer. The decoder's input
    itself is zero where an image is.
    """

    config_classes = ("transformers.Granite4VisionConfig",)
    summary = "granite4_vision: SigLIP 2, windowed Q-Formers, levels into several layers"

    @classmethod
    def why_not(cls, hf_config: Any) -> str | None:
        return (
            kind_mismatch(hf_config, ("siglip_vision_model",), (TEXT_MODEL, *GRANITES))
            or _flag_mismatch(hf_config)
            or _level_mismatch(hf_config)
            or _window_mismatch(hf_config)
            or _qformer_mismatch(hf_config)
            or tower_mismatch(hf_config.vision_config, [])
            or select_mismatch(hf_config)
            or pinpoint_mismatch(hf_config)
            or decoder_mismatch(_granite(hf_config.text_config))
        )

    @cached_property
    def text_config(self) -> Any:  # made once
        return _granite(self.hf_config.text_config)

    # -- levels ----------------------------------------------------------------------------------

    @property
    def feature_levels(self) -> int:
        return len(_decoder_layers(self.hf_config))

    @property
    def feature_width(self) -> int:
        return self.text_config.hidden_size * self.feature_levels

    @property
    def feature_layers(self) -> list[int]:
        return sorted(set(_tower_layers(self.hf_config)))

    @property
    def tile_side(self) -> int:
        return super().tile_side // SHRINK

    def merge(
        self, text: torch.Tensor, features: torch.Tensor, feature_index: torch.Tensor
    ) -> torch.Tensor:
        """Put zeros where features are: they have no columns for the decoder's input."""
        return text.masked_fill((feature_index != TEXT).unsqueeze(-1), 0.0)

    def merge_levels(
        self, text: torch.Tensor, features: torch.Tensor, feature_index: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return merge_levels(text, features.to(text.dtype), feature_index)

    # -- the model -------------------------------------------------------------------------------

    def composition(self, for_card: bool) -> CompositionConfig:
        config = super().composition(for_card)
        config.deepstack_layers = tuple(_decoder_layers(self.hf_config))
        return config

    def projector(self, config: Any) -> nn.Module:
        vision, qformer = self.hf_config.vision_config, self.hf_config.qformer_config
        sizes = WindowQFormerConfig(
            hidden_size=vision.hidden_size,
            nheads=qformer.num_attention_heads,
            intermediate_size=qformer.intermediate_size,
            nlayers=qformer.num_hidden_layers,
            norm_eps=qformer.layer_norm_eps,
            out_features=self.text_config.hidden_size,
            side=vision.image_size // vision.patch_size,
            window=_window(self.hf_config),
        )
        states = [self.feature_layers.index(layer) for layer in _tower_layers(self.hf_config)]
        corners = [None] * (len(states) - CORNERS) + list(range(CORNERS))
        return LevelProjector(sizes, tuple(map(Level, states, corners)))

    def encode_part(self, model: FmsModel, pixels: torch.Tensor) -> Pieces[torch.Tensor]:
        states = yield from model.select_hidden_states(pixels)
        return (yield from model.multi_modal_projector.pieces(states))

    def rename(self, name: str) -> str:
        name = name.removeprefix("model.")
        first = len(self.hf_config.deepstack_layer_map)
        spatial = re.match(r"spatial_projectors\.(\d+)\.", name)
        if spatial is not None:
            number = first + int(spatial[1])
            name = f"layerwise_projectors.{number}.{name[spatial.end() :]}"
        if name.startswith("layerwise_projectors."):
            name = renamed(name, NAMES)
        return super().rename(name)

    def pack(self, model: FmsModel, tiles: torch.Tensor, size: list[int]) -> torch.Tensor:
        """Features ``(num_features, levels * hidden_size)``; see :meth:`LlavaNext.pack`."""
        height, width = size
        rows, columns = self._tiles_of(width, height)
        side, newline = self.tile_side, model.image_newline.repeat(self.feature_levels)
        grid = tiles[1:].unflatten(1, (side, side)).unflatten(0, (rows, columns))
        grid = grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        kept = model.unpad_image(grid.movedim(-1, 0), size).movedim(0, -1)
        ends = newline.expand(len(kept), 1, -1)
        return torch.cat([tiles[0], torch.cat([kept, ends], dim=1).flatten(0, 1)])


# -- the configuration ----------------------------------------------------------------------------


def _granite(text: Any) -> Any:
    """The decoder's configuration as that of a text model; its own is Granite's by another name."""
    return as_text_model(text, "granite") if text.model_type == TEXT_MODEL else text


def _tower_layers(config: Any) -> list[int]:
    """For each level the index of the hidden state that it is made of, from the front."""
    states = range(config.vision_config.num_hidden_layers + 1)
    deep = [states[layer] for layer, _ in config.deepstack_layer_map]
    return deep + [states[config.spatial_vision_layer]] * CORNERS


def _decoder_layers(config: Any) -> list[int]:
    """For each level the decoder layer before whose input it is added."""
    return [layer for _, layer in config.deepstack_layer_map] + list(config.spatial_target_layers)


def _window(config: Any) -> int:
    """Patches on the side of a window."""
    return int(config.downsample_rate.partition("/")[2])


def _flag_mismatch(config: Any) -> str | None:
    """Why a flag of published configurations, which Transformers does not read, does not fit."""
    if getattr(config, "adapter_path", None) is not None:
        return (
            f"adapter_path {config.adapter_path!r} names a LoRA adapter, which would not be "
            "applied: merge it into the weights"
        )
    for flag in ("use_spatial_sampling", "use_image_newline_parameter"):
        if getattr(config, flag, True) is not True:
            return f"{flag} is {getattr(config, flag)}, which is not implemented"
    stride = getattr(config, "spatial_stride", SHRINK)
    if stride != SHRINK:
        return f"spatial_stride {stride} is not implemented, only {SHRINK}"
    return None


def _level_mismatch(config: Any) -> str | None:
    """Why the levels would not be computed as configured, or None."""
    if config.deepstack_layer_map is None:
        return "deepstack_layer_map is missing"
    targets = config.spatial_target_layers
    if len(targets) != CORNERS:
        return f"spatial_target_layers has {len(targets)} layers, not {CORNERS}"
    states = config.vision_config.num_hidden_layers + 1
    named = [("deepstack_layer_map", layer) for layer, _ in config.deepstack_layer_map]
    for name, layer in [*named, ("spatial_vision_layer", config.spatial_vision_layer)]:
        if not -states <= layer < states:
            return f"{name} {layer} is outside the tower's {states} hidden states"
    layers, last = _decoder_layers(config), config.text_config.num_hidden_layers - 1
    for layer in layers:
        if not 0 <= layer <= last:
            return f"a level goes to decoder layer {layer}, but the last one is {last}"
        if layers.count(layer) > 1:
            return f"several levels go to decoder layer {layer}"
    return None


def _window_mismatch(config: Any) -> str | None:
    """Why a tile is not cut into windows as configured, or None."""
    rate, vision = str(config.downsample_rate), config.vision_config
    numbers = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", rate)
    if numbers is None or Fraction(rate) != Fraction(1, SHRINK):
        return f"downsample_rate {config.downsample_rate!r} is not implemented, only 1/{SHRINK}"
    side = vision.image_size // vision.patch_size
    if side % _window(config):
        return (
            f"downsample_rate {rate!r}: windows of {numbers[2]} patches do not fit a tile of {side}"
        )
    return None


def _qformer_mismatch(config: Any) -> str | None:
    """First property of the Q-Former's configuration that would not be honoured, or None."""
    qformer, width = config.qformer_config, config.vision_config.hidden_size
    if qformer.model_type != "blip_2_qformer":
        return f"qformer_config.model_type {qformer.model_type!r} is not implemented"
    expected = {
        "hidden_size": width,
        "encoder_hidden_size": width,
        "hidden_act": "gelu",
        "cross_attention_frequency": 1,
        "use_qformer_text_input": False,
    }
    for name, value in expected.items():
        if getattr(qformer, name) != value:
            return (
                f"qformer_config.{name} {getattr(qformer, name)} is not implemented, only {value}"
            )
    if width % qformer.num_attention_heads:
        return "qformer_config.hidden_size is no multiple of its num_attention_heads"
    return width_mismatch(qformer, "qformer_config.")

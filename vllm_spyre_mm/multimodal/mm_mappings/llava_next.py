# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Next as FMS implements it: a SigLIP tower, tiles, and a Granite decoder."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vllm_spyre_mm.multimodal.mm_mappings.base import (
    FmsModel,
    KVCacheOptions,
    LoadOverrides,
    MMUtils,
    UnsupportedModelError,
)

CARD_HEAD_DIM = 128
"""Width of a head that the card's compiler expects."""

TILES_AT_ONCE = 4
"""Tiles that go through the tower together: enough rows for full speed, and activations (25 MB in a
layer of Granite Vision's tower) that the allocator gives out again rather than back."""

TIED = ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight")
"""The head and the embedding, in the layout of :func:`_canonical_name`."""


class LlavaNext(MMUtils):
    """LLaVA-Next with one vision feature layer.

    An image is a *base* tile (the whole picture) and a grid of tiles at a higher resolution. Its
    features are those of the base tile, then the grid's row by row without the padding that was
    added to keep the aspect ratio, a learnt *newline* feature after each row.
    """

    config_classes = ("transformers.LlavaNextConfig", "fms.LlavaNextConfig")
    summary = "llava_next: SigLIP vision, one feature layer, Granite decoder"

    @classmethod
    def why_not(cls, hf_config: Any) -> str | None:
        if not isinstance(hf_config.vision_feature_layer, int):
            return "it takes one vision_feature_layer, not several"
        return first_mismatch(hf_config)

    @property
    def text_config(self) -> Any:
        return self.hf_config.text_config

    @property
    def image_token_id(self) -> int:
        return self.hf_config.image_token_index

    @property
    def feature_layers(self) -> list[int]:
        """Indices of the hidden states that make the features; 0 is the embeddings'."""
        layers = self.hf_config.vision_feature_layer
        num_states = self.hf_config.vision_config.num_hidden_layers + 1
        return [range(num_states)[i] for i in ([layers] if isinstance(layers, int) else layers)]

    def kv_cache_options(self, for_card: bool = False) -> KVCacheOptions:
        text = self.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if for_card and CARD_HEAD_DIM % head_dim:
            raise UnsupportedModelError(
                f"heads of {head_dim} cannot be padded to the {CARD_HEAD_DIM} that the card wants"
            )
        return KVCacheOptions(
            num_layers=text.num_hidden_layers,
            num_kv_heads=text.num_key_value_heads,
            head_dim=CARD_HEAD_DIM if for_card else head_dim,
        )

    def load_overrides(self, for_card: bool = False) -> LoadOverrides:
        from fms.models import llava_next as fms_llava_next
        from fms.models.hf.config_utils.param_builders import build_llava_next_params

        derived = build_llava_next_params(self.hf_config)
        if for_card:
            derived["text_config"] = dataclasses.replace(
                derived["text_config"], head_dim=CARD_HEAD_DIM
            )
        # Layers above the last that is looked at are not built. Counting from the front keeps
        # the indices right in the shorter tower.
        layers = self.feature_layers
        num_layers = max(layers)
        derived["vision_config"] = dataclasses.replace(derived["vision_config"], nlayers=num_layers)
        derived["vision_feature_layer"] = layers if len(layers) > 1 else layers[0]
        return LoadOverrides(
            architecture="llava_next",
            model_class=fms_llava_next.LlavaNext,
            config=fms_llava_next.LlavaNextConfig(**derived, fused_weights=not for_card),
            rename=_canonical_name,
            is_unused=lambda name: _is_unused(name, num_layers),
            tied=TIED if self.text_config.tie_word_embeddings else None,
            encoder_modules=("vision_tower", "multi_modal_projector", "image_newline"),
            prune=_prune,
            encoder_blocks=lambda model: model.vision_tower.base_model.encoder.layers,
            decoder_blocks=lambda model: model.language_model.base_model.layers,
        )

    def warmup_image_sizes(self) -> list[tuple[int, int]]:
        # The number of tiles is a dynamic dimension from 2 up: the largest and the smallest grid.
        areas = sorted(self.hf_config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
        return [(width, height) for height, width in (areas[-1], areas[0])]

    def compute_features(self, model: FmsModel, mm_kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        image_sizes = mm_kwargs["image_sizes"].tolist()
        side = self.hf_config.vision_config.image_size
        # The processor pads an image's tiles to the most that any image of its prompt has.
        tiles = [
            pixels[
                : model.image_size_to_num_patches(size, self.hf_config.image_grid_pinpoints, side)
            ]
            for pixels, size in zip(mm_kwargs["pixel_values"], image_sizes, strict=True)
        ]
        counts = [len(pixels) for pixels in tiles]
        per_image = self._encode_tiles(model, torch.cat(tiles)).split(counts)
        return [
            model.pack_image_features([features], [size], model.image_newline)
            for features, size in zip(per_image, image_sizes, strict=True)
        ]

    def _encode_tiles(self, model: FmsModel, pixels: torch.Tensor) -> torch.Tensor:
        """Features ``(tiles, patches, hidden_size)`` of ``(tiles, channels, side, side)``.

        A few tiles at a time, so that memory does not grow with their number. The parts are of
        nearly the same size: two tiles at least, as every image has.
        """
        parts = []
        for part in pixels.tensor_split(-(-len(pixels) // TILES_AT_ONCE)):
            _, _, states = model.vision_tower(part, output_hidden_states=True)
            chosen = [states[layer] for layer in self.feature_layers]
            parts.append(model.multi_modal_projector(torch.cat(chosen, dim=-1)))
        return torch.cat(parts)

    def embed_tokens(self, model: FmsModel, token_ids: torch.Tensor) -> torch.Tensor:
        return model.language_model.base_model.embedding(token_ids)


def first_mismatch(config: Any) -> str | None:
    """First property of a ``llava_next`` configuration that FMS would not honour, or None.

    FMS builds SigLIP and Granite whatever a configuration says, and reads only part of it: what it
    ignores must have the one value that it assumes.
    """
    vision, text = config.vision_config, config.text_config
    expected = (
        ("vision_config.model_type", vision.model_type, "siglip_vision_model"),
        ("text_config.model_type", text.model_type, "granite"),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy, "full"),
        ("projector_hidden_act", config.projector_hidden_act, "gelu"),
        ("multimodal_projector_bias", config.multimodal_projector_bias, True),
    )
    for name, value, wanted in expected:
        if value != wanted:
            return f"{name} is {value!r}, and only {wanted!r} is implemented"
    for name, part in (("vision_config", vision), ("text_config", text)):
        # FMS computes the width of its feed-forward layers from a ratio, in floating point.
        built = int(part.hidden_size * (part.intermediate_size / part.hidden_size))
        if built != part.intermediate_size:
            return f"{name}.intermediate_size {part.intermediate_size} would be built as {built}"
    return _vision_mismatch(config, vision) or _text_mismatch(text)


def _vision_mismatch(config: Any, vision: Any) -> str | None:
    if vision.hidden_act not in ("gelu_pytorch_tanh", "gelu"):
        return f"vision_config.hidden_act {vision.hidden_act!r} is not implemented"
    if vision.hidden_size % vision.num_attention_heads:
        return "vision_config.hidden_size is no multiple of its num_attention_heads"
    layers = config.vision_feature_layer
    num_states = vision.num_hidden_layers + 1
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -num_states <= layer < num_states:
            return f"vision_feature_layer {layer} is outside the tower's {num_states} hidden states"
    for pinpoint in config.image_grid_pinpoints:
        if any(side <= 0 or side % vision.image_size for side in pinpoint):
            return f"image_grid_pinpoints has {pinpoint}, no multiple of {vision.image_size}"
    return None


def _text_mismatch(text: Any) -> str | None:
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        return f"text_config rope_type {rope['rope_type']!r} is not implemented"
    if text.hidden_act not in ("silu", "swish"):
        return f"text_config.hidden_act {text.hidden_act!r} is not implemented"
    for bias in ("mlp_bias", "attention_bias"):
        if getattr(text, bias, False):
            return f"text_config.{bias} is not implemented"
    return None


def _canonical_name(name: str) -> str:
    """A tensor's name in the layout of Transformers 4, which FMS's adapter knows.

    Transformers 4.52 put everything but the head below ``model.``; Transformers 5 dropped
    ``vision_model.`` inside the tower.
    """
    name = name.removeprefix("model.")
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    return re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)


def _is_unused(name: str, num_layers: int) -> bool:
    """SigLIP's pooling head and final norm, and layers above the last feature layer."""
    tower = "vision_tower.vision_model."
    if name.startswith((f"{tower}head.", f"{tower}post_layernorm.")):
        return True
    layer = re.match(rf"{re.escape(tower)}encoder\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= num_layers


def _prune(model: FmsModel) -> None:
    """Take the pooling head and the final norm, whose outputs nobody reads, out of the tower."""
    model.vision_tower.head = nn.Identity()
    model.vision_tower.base_model.post_layernorm = nn.Identity()

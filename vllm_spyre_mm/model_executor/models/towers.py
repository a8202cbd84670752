# SPDX-License-Identifier: Apache-2.0
"""The vision towers, and which Transformers configurations they compute exactly."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fms.models.pixtral_vision import (
    PixtralVisionConfig,
    PixtralVisionModel,
    get_positions_in_meshgrid,
)
from fms.models.siglip_vision import SiglipVision, SiglipVisionConfig
from fms.utils.config import ModelConfig
from torch import nn

from vllm_spyre_mm.model_executor.cpu.bidirectional import hidden_states
from vllm_spyre_mm.model_executor.models import clip_vision, idefics3_vision, qwen_vision
from vllm_spyre_mm.model_executor.models.clip_vision import CLIPVision, CLIPVisionConfig
from vllm_spyre_mm.model_executor.models.decoders import width_mismatch
from vllm_spyre_mm.model_executor.models.qwen_vision import QwenVision


def _siglip(config: SiglipVisionConfig) -> nn.Module:
    """FMS's SigLIP without the pooling head and the final norm, whose outputs are not used."""
    tower: Any = SiglipVision(config)
    tower.head = nn.Identity()
    tower.base_model.post_layernorm = nn.Identity()
    return tower


def _siglip_states(tower: Any, pixel_values: torch.Tensor) -> Iterator[torch.Tensor]:
    return hidden_states(tower.base_model.embeddings(pixel_values), tower.base_model.encoder.layers)


def _clip_states(tower: Any, pixel_values: torch.Tensor) -> Iterator[torch.Tensor]:
    return tower(pixel_values)


def _pixtral_states(tower: Any, pixel_values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Hidden states of one picture: with several, FMS lets their patches attend to each other."""
    (patches,) = tower.patch_conv(pixel_values.to(tower.patch_conv.weight.dtype))
    positions = get_positions_in_meshgrid([patches])
    embeddings = tower.ln_pre(patches.flatten(1).T.unsqueeze(0))
    return hidden_states(embeddings, tower.transformer.layers, position_ids=positions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """A vision encoder as a part of a composition.

    Attributes:
        build: makes the module from its configuration.
        adapter: FMS's architecture whose adapter reads the checkpoint.
        prefix: prefix that the adapter expects before a tower's names.
    """

    build: Callable[[Any], nn.Module]
    adapter: str
    prefix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower(Encoder):
    """A vision tower of whose hidden states a projector makes features.

    Attributes:
        hidden_states: computes, from pixels ``(tiles, 3, height, width)``, the embeddings and the
            output of each layer, ``(tiles, positions, hidden_size)`` each; one after the other, so
            that only those in use take memory.
        config_class: its configuration, in FMS's style.
        blocks: the repeated blocks of a tower, and the prefix of their names in a checkpoint.
        inner: the part that Transformers 4 writes between ``vision_tower.`` and a tower's name.
        unused: prefixes, below ``inner``, of names that have no part in the hidden states.
        class_token: whether the first position is a class token and not a patch.
        activations: the activations that it computes.
        own_fields: what its configuration has beside the fields that all towers have, by the
            Transformers configuration.
    """

    hidden_states: Callable[[nn.Module, torch.Tensor], Iterable[torch.Tensor]]
    config_class: Callable[..., ModelConfig]
    blocks: tuple[Callable[[Any], nn.ModuleList], str]
    inner: str
    unused: tuple[str, ...]
    class_token: bool
    activations: tuple[str, ...]
    own_fields: Callable[[Any], dict[str, Any]]

    def config(self, vision: Any, num_layers: int) -> ModelConfig:
        """FMS's configuration of the tower's first layers.

        Args:
            vision: the Transformers configuration; :func:`tower_mismatch` has accepted it.
            num_layers: layers to build: up to the last whose output is used.
        """
        return self.config_class(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            nlayers=num_layers,
            nheads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_act=vision.hidden_act,
            **self.own_fields(vision),
        )


def _layer_norm(vision: Any) -> dict[str, Any]:
    return {"layer_norm_eps": vision.layer_norm_eps}


def _rope(vision: Any) -> dict[str, Any]:
    return {"rope_theta": vision.rope_parameters["rope_theta"]}


IDEFICS3 = Tower(
    build=idefics3_vision.build,
    hidden_states=idefics3_vision.states,
    config_class=SiglipVisionConfig,
    adapter="siglip_vision",
    inner="vision_model.",
    blocks=(lambda tower: tower.base_model.encoder.layers, "encoder.layers."),
    unused=("embeddings.position_ids",),
    class_token=False,
    activations=("gelu", "gelu_pytorch_tanh"),
    own_fields=_layer_norm,
)
"""SigLIP whose last hidden state is taken after the final norm, and is the only one used."""

TOWERS: Mapping[str, Tower] = {
    "siglip_vision_model": Tower(
        build=_siglip,
        hidden_states=_siglip_states,
        config_class=SiglipVisionConfig,
        adapter="siglip_vision",
        inner="vision_model.",
        blocks=(lambda tower: tower.base_model.encoder.layers, "encoder.layers."),
        unused=("head.", "post_layernorm.", "embeddings.position_ids"),
        class_token=False,
        activations=("gelu", "gelu_pytorch_tanh"),
        own_fields=_layer_norm,
    ),
    "clip_vision_model": Tower(
        build=CLIPVision,
        hidden_states=_clip_states,
        config_class=CLIPVisionConfig,
        adapter=clip_vision.ARCHITECTURE,
        inner="vision_model.",
        blocks=(lambda tower: tower.encoder.layers, "encoder.layers."),
        unused=("post_layernorm.", "embeddings.position_ids"),
        class_token=True,
        activations=("quick_gelu", "gelu"),
        own_fields=_layer_norm,
    ),
    "pixtral": Tower(
        build=PixtralVisionModel,
        hidden_states=_pixtral_states,
        config_class=PixtralVisionConfig,
        adapter="mistral3",
        prefix="vision_tower.",
        inner="",
        blocks=(lambda tower: tower.transformer.layers, "transformer.layers."),
        unused=(),
        class_token=False,
        activations=("gelu", "silu"),
        own_fields=_rope,
    ),
    "idefics3_vision": IDEFICS3,
    "smolvlm_vision": IDEFICS3,
}
"""The towers by Transformers' ``model_type``."""

QWEN_VISION = Encoder(build=QwenVision, adapter=qwen_vision.ARCHITECTURE)
"""The towers of Qwen-VL, which make features themselves."""


def tower_mismatch(vision: Any, layers: list[int]) -> str | None:
    """First property of a tower's configuration that would not be honoured, or None.

    Args:
        vision: the Transformers configuration of one of :data:`TOWERS`.
        layers: the hidden states that are used, as the model's configuration counts them.
    """
    if vision.hidden_act not in TOWERS[vision.model_type].activations:
        return f"vision_config.hidden_act {vision.hidden_act!r} is not implemented"
    for side in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, side), int):
            return f"vision_config.{side} {getattr(vision, side)} is not one number"
    if vision.num_channels != 3:
        return f"vision_config.num_channels {vision.num_channels} is not implemented, only 3"
    if vision.hidden_size % vision.num_attention_heads:
        return "vision_config.hidden_size is no multiple of its num_attention_heads"
    head_dim = vision.hidden_size // vision.num_attention_heads
    if getattr(vision, "head_dim", head_dim) != head_dim:
        return f"vision_config.head_dim {vision.head_dim} is not hidden_size / num_attention_heads"
    num_states = vision.num_hidden_layers + 1
    for layer in layers:
        if not -num_states <= layer < num_states:
            return f"vision_feature_layer {layer} is outside the tower's {num_states} hidden states"
    return width_mismatch(vision, "vision_config.")

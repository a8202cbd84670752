# SPDX-License-Identifier: Apache-2.0
"""Configuration of the Qwen-VL towers, and which of Transformers' they compute exactly."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fms.utils.config import ModelConfig

from vllm_spyre_mm.model_executor.models.decoders import width_mismatch


@dataclass
class QwenVisionConfig(ModelConfig):
    """A tower of Qwen3-VL, Qwen2.5-VL or Qwen2-VL; the values are Qwen3-VL 4B's.

    Attributes:
        hidden_size: width of the blocks.
        intermediate_size: width inside of a block's feed-forward part.
        nlayers: blocks.
        nheads: heads of a block's attention.
        out_hidden_size: width of a feature, for each depth.
        in_channels: of a pixel.
        patch_size: pixels on the side of a patch.
        temporal_patch_size: pictures that are encoded as one frame.
        spatial_merge_size: patches on the side of a square that becomes one feature.
        rope_theta: base of the rotation's frequencies.
        hidden_act: activation of the feed-forward part; of its gates, where it has gates.
        gated: whether the feed-forward part is a gated linear unit.
        rms_norm: whether norms are RMSNorm without biases, and not LayerNorm.
        patch_bias: whether the embedding of a patch has a bias.
        num_position_embeddings: cells of the square grid of learnt positions; 0 for none.
        deepstack_layers: blocks whose output makes further features, in order.
        window: squares on the side of a window of attention; 0 for attention within a frame.
        full_attention_layers: blocks with attention within a frame in spite of windows.
        layer_norm_eps: of all norms.
        fused_weights: whether a gated unit's two projections are one.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    nlayers: int = 24
    nheads: int = 16
    out_hidden_size: int = 2560
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    rope_theta: float = 10000.0
    hidden_act: str = "gelu_pytorch_tanh"
    gated: bool = False
    rms_norm: bool = False
    patch_bias: bool = True
    num_position_embeddings: int = 2304
    deepstack_layers: tuple[int, ...] = (5, 11, 17)
    window: int = 0
    full_attention_layers: tuple[int, ...] = ()
    layer_norm_eps: float = 1e-6
    fused_weights: bool = True

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.nheads

    @property
    def patch_values(self) -> int:
        """Numbers of a patch: of all channels, pictures and pixels."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


def _qwen3_vl(vision: Any) -> dict[str, Any]:
    return {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "out_hidden_size": vision.out_hidden_size,
        "num_position_embeddings": vision.num_position_embeddings,
        "deepstack_layers": tuple(vision.deepstack_visual_indexes),
    }


def _qwen2_5_vl(vision: Any) -> dict[str, Any]:
    return {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "out_hidden_size": vision.out_hidden_size,
        "gated": True,
        "rms_norm": True,
        "patch_bias": False,
        "window": vision.window_size // vision.spatial_merge_size // vision.patch_size,
        "full_attention_layers": tuple(vision.fullatt_block_indexes),
        "num_position_embeddings": 0,
        "deepstack_layers": (),
    }


def _qwen2_vl(vision: Any) -> dict[str, Any]:
    return {
        "hidden_size": vision.embed_dim,
        "intermediate_size": int(vision.embed_dim * vision.mlp_ratio),
        "out_hidden_size": vision.hidden_size,
        "patch_bias": False,
        "num_position_embeddings": 0,
        "deepstack_layers": (),
    }


OWN_FIELDS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "Qwen3VLVisionConfig": _qwen3_vl,
    "Qwen2_5_VLVisionConfig": _qwen2_5_vl,
    "Qwen2VLVisionConfig": _qwen2_vl,
}
"""What a tower has of its own, by the class of its Transformers configuration."""

ACTIVATIONS = {False: ("gelu_pytorch_tanh", "gelu", "quick_gelu"), True: ("silu",)}
"""Activations that are computed, without gates and with them."""


def qwen_vision_config(vision: Any) -> QwenVisionConfig:
    """FMS's configuration of a tower.

    Args:
        vision: the Transformers configuration; :func:`qwen_vision_mismatch` has accepted it.
    """
    return QwenVisionConfig(
        nlayers=vision.depth,
        nheads=vision.num_heads,
        in_channels=vision.in_channels,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        spatial_merge_size=vision.spatial_merge_size,
        rope_theta=vision.rope_parameters["rope_theta"],
        hidden_act=vision.hidden_act,
        **OWN_FIELDS[type(vision).__name__](vision),
    )


def qwen_vision_mismatch(vision: Any) -> str | None:
    """First property of a tower's configuration that would not be honoured, or None.

    Args:
        vision: a Transformers configuration of one of :data:`OWN_FIELDS`.
    """
    for side in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(vision, side), int):
            return f"vision_config.{side} {getattr(vision, side)} is not one number"
    rope_type = vision.rope_parameters["rope_type"]
    if rope_type != "axial":
        return f"vision_config.rope_type {rope_type!r} is not implemented"
    config = qwen_vision_config(vision)
    if config.hidden_act not in ACTIVATIONS[config.gated]:
        return f"vision_config.hidden_act {config.hidden_act!r} is not implemented"
    return _size_mismatch(config, vision) or _layer_mismatch(config)


def _size_mismatch(config: QwenVisionConfig, vision: Any) -> str | None:
    if config.hidden_size % (4 * config.nheads):
        return "vision_config.num_heads does not divide the width into heads of a multiple of 4"
    if (getattr(vision, "head_dim", None) or config.head_dim) != config.head_dim:
        return f"vision_config.head_dim {vision.head_dim} is not the width / num_heads"
    positions = config.num_position_embeddings
    if math.isqrt(positions) ** 2 != positions:
        return f"vision_config.num_position_embeddings {positions} is not a square"
    return width_mismatch(config, "vision_config.")


def _layer_mismatch(config: QwenVisionConfig) -> str | None:
    levels = list(config.deepstack_layers)
    if levels != sorted(set(levels) & set(range(config.nlayers))):
        return f"vision_config.deepstack_visual_indexes {levels} are not layers in ascending order"
    return None

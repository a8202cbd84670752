# SPDX-License-Identifier: Apache-2.0
"""Qwen-VL: a tower for pictures and videos of any size, and positions on three axes.

Three generations share everything but the tower, the decoder and where sections of the rotation
lie: see :class:`Qwen3VL`, :class:`Qwen25VL` and :class:`Qwen2VL`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vllm_spyre_mm.model_executor.models.composition import DECODER, TOWER, CompositionConfig
from vllm_spyre_mm.model_executor.models.decoders import decoder_mismatch, head_dim_of
from vllm_spyre_mm.model_executor.models.mrope import MRope, mrope_mismatch
from vllm_spyre_mm.model_executor.models.names import renamed
from vllm_spyre_mm.model_executor.models.qwen_vision_config import (
    qwen_vision_config,
    qwen_vision_mismatch,
)
from vllm_spyre_mm.model_executor.models.towers import QWEN_VISION
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.model_executor.spec import FmsModel, LoadOverrides
from vllm_spyre_mm.multimodal.feature_layout import FeatureGrid, FeatureLayout
from vllm_spyre_mm.multimodal.mm_mappings.decoder import (
    JOINED_PATCHES,
    DecoderMapping,
    as_text_model,
)
from vllm_spyre_mm.multimodal.mm_mappings.mrope_positions import mrope_positions

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

MROPE_KEYS = ("mrope_section", "mrope_interleaved", "type")
"""What a decoder's RoPE parameters say beside those of a text model."""

PARTS = (
    (r"^(model\.)?visual\.", f"{TOWER}."),
    (r"^model\.(language_model\.)?", f"{DECODER}.model."),
    (r"^lm_head\.", f"{DECODER}.lm_head."),
)
"""The names of the parts in a checkpoint, and here.

Since Transformers 4.52 "visual." is below "model.", beside "language_model.".
"""


class QwenVL(DecoderMapping):
    """Base class of the generations.

    The processor scales a picture to whole squares of ``spatial_merge_size`` patches a side, within
    bounds on its pixels; each square is one feature. ``temporal_patch_size`` frames of a video are
    encoded together.
    """

    decoder_type: ClassVar[str]
    """Transformers' ``model_type`` of the decoder as a text model."""

    interleaved: ClassVar[bool] = False
    """Whether the axes of the positions alternate in a head, or have a section each."""

    @classmethod
    def why_not(cls, hf_config: Any) -> str | None:
        return (
            qwen_vision_mismatch(hf_config.vision_config)
            or _width_mismatch(hf_config)
            or cls._interleaved_mismatch(hf_config)
            or mrope_mismatch(cls._mrope(hf_config), head_dim_of(hf_config.text_config))
            or decoder_mismatch(cls._text_config(hf_config))
        )

    @classmethod
    def _interleaved_mismatch(cls, hf_config: Any) -> str | None:
        """Why the order of the axes is another one, or None; Transformers does not look at it."""
        rope = hf_config.text_config.rope_parameters
        given = rope.get("mrope_interleaved", cls.interleaved)
        if given != cls.interleaved:
            return f"text_config.mrope_interleaved {given} is not implemented"
        return None

    @classmethod
    def _mrope(cls, hf_config: Any) -> MRope:
        """The axes of the decoder's positions."""
        sections = hf_config.text_config.rope_parameters.get("mrope_section", ())
        return MRope(tuple(sections), cls.interleaved)

    @classmethod
    def _text_config(cls, hf_config: Any) -> Any:
        """The decoder's configuration as that of a text model."""
        text = hf_config.text_config
        rope = {key: value for key, value in text.rope_parameters.items() if key not in MROPE_KEYS}
        tied = hf_config.tie_word_embeddings
        return as_text_model(text, cls.decoder_type, rope_parameters=rope, tie_word_embeddings=tied)

    @cached_property
    def text_config(self) -> Any:
        return self._text_config(self.hf_config)

    @property
    def encoder_head_dim(self) -> int:
        return qwen_vision_config(self.hf_config.vision_config).head_dim

    @property
    def encoder_batch_values(self) -> int:
        return JOINED_PATCHES * qwen_vision_config(self.hf_config.vision_config).patch_values

    @property
    def encoder_summary(self) -> str:
        vision = self.hf_config.vision_config
        return (
            f"{vision.model_type}, {vision.depth} layers, pictures and videos of any size in "
            f"patches of {vision.patch_size}"
        )

    @property
    def image_token_id(self) -> int:
        return self.hf_config.image_token_id

    @property
    def feature_token_ids(self) -> Mapping[str, int]:
        return {"image": self.hf_config.image_token_id, "video": self.hf_config.video_token_id}

    @property
    def merge_size(self) -> int:
        """Patches on the side of a square that becomes one feature."""
        return self.hf_config.vision_config.spatial_merge_size

    def composition(self, for_card: bool) -> CompositionConfig:
        config = super().composition(for_card)
        config.tower = QWEN_VISION
        config.vision_config = qwen_vision_config(self.hf_config.vision_config)
        config.mrope = self._mrope(self.hf_config)
        return config

    def load_overrides(self, for_card: bool = False) -> LoadOverrides:
        return dataclasses.replace(
            super().load_overrides(for_card),
            encoder_modules=(TOWER,),
            encoder_blocks=lambda model: model.vision_tower.blocks,
        )

    def rename(self, name: str) -> str:
        return renamed(name, PARTS)

    def positions(
        self, token_ids: list[int], mm_features: "Sequence[MultiModalFeatureSpec]"
    ) -> tuple[torch.Tensor, int]:
        return mrope_positions(self.hf_config, token_ids, mm_features)

    def feature_pieces(
        self, model: FmsModel, mm_kwargs: Mapping[str, Any]
    ) -> Pieces[list[torch.Tensor]]:
        is_video = "pixel_values_videos" in mm_kwargs
        pixels = mm_kwargs["pixel_values_videos" if is_video else "pixel_values"]
        grids = mm_kwargs["video_grid_thw" if is_video else "image_grid_thw"]
        counts = grids.prod(dim=-1) // self.merge_size**2
        features = yield from model.vision_tower.pieces(pixels, grids)
        return list(features.split(counts.tolist()))

    def feature_layout(self, mm_kwargs: Mapping[str, Any]) -> FeatureLayout | None:
        grid_of = mm_kwargs.get("video_grid_thw", mm_kwargs.get("image_grid_thw"))
        if grid_of is None:
            return None
        frames, height, width = grid_of.data.tolist()
        rows, columns = height // self.merge_size, width // self.merge_size
        grid = FeatureGrid(0, rows, columns, columns)
        return FeatureLayout(frames * rows * columns, grid, frames=frames)

    def warmup_image_sizes(self) -> list[tuple[int, int]]:
        side = 4 * self.merge_size * self.hf_config.vision_config.patch_size
        return [(side, side), (2 * side, side)]


class Qwen3VL(QwenVL):
    """Qwen3-VL: deepstack into the first decoder layers, interleaved sections, Qwen 3."""

    config_classes = ("transformers.Qwen3VLConfig",)
    summary = "qwen3_vl: Qwen 3, deepstack, pictures and video"
    decoder_type = "qwen3"
    interleaved = True

    @property
    def feature_levels(self) -> int:
        return len(self.hf_config.vision_config.deepstack_visual_indexes)

    def composition(self, for_card: bool) -> CompositionConfig:
        config = super().composition(for_card)
        # A level is added to what the layer of its number returns.
        config.deepstack_layers = tuple(range(1, 1 + self.feature_levels))
        return config

    @classmethod
    def why_not(cls, hf_config: Any) -> str | None:
        levels = len(hf_config.vision_config.deepstack_visual_indexes)
        if levels >= hf_config.text_config.num_hidden_layers:
            return f"vision_config.deepstack_visual_indexes has {levels} levels, for as many layers"
        return super().why_not(hf_config)


class Qwen25VL(QwenVL):
    """Qwen2.5-VL: a tower with windows, sections one after the other, Qwen 2."""

    config_classes = ("transformers.Qwen2_5_VLConfig",)
    summary = "qwen2_5_vl: Qwen 2, a tower with windows, pictures and video"
    decoder_type = "qwen2"


class Qwen2VL(QwenVL):
    """Qwen2-VL: a tower without windows, sections one after the other, Qwen 2."""

    config_classes = ("transformers.Qwen2VLConfig",)
    summary = "qwen2_vl: Qwen 2, pictures and video"
    decoder_type = "qwen2"


def _width_mismatch(config: Any) -> str | None:
    """Why the tower's features do not fit the decoder, or None."""
    vision, text = config.vision_config, config.text_config
    width = vision.hidden_size if config.model_type == "qwen2_vl" else vision.out_hidden_size
    if width != text.hidden_size:
        return f"vision_config makes features of {width}, and text_config.hidden_size is another"
    return None

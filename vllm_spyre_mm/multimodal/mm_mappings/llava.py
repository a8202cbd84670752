# SPDX-License-Identifier: Apache-2.0
"""LLaVA 1.5: an image is one square, and every patch of it one feature."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vllm_spyre_mm.model_executor.models.composition import CompositionConfig
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.model_executor.spec import FmsModel
from vllm_spyre_mm.multimodal.feature_layout import FeatureGrid, FeatureLayout
from vllm_spyre_mm.multimodal.mm_mappings.vision_language import (
    TILE_TOWERS,
    VisionLanguageMapping,
    first_mismatch,
    select_mismatch,
)


class Llava(VisionLanguageMapping):
    """LLaVA without tiles.

    The processor scales an image until it covers the tower's square and cuts the rest off. Its
    features are the patches row by row; with ``vision_feature_select_strategy`` ``full`` the class
    token comes before them, if the tower has one.
    """

    config_classes = ("transformers.LlavaConfig",)
    summary = "llava: SigLIP or CLIP vision, no tiles"

    @classmethod
    def why_not(cls, hf_config: Any) -> str | None:
        return first_mismatch(hf_config, TILE_TOWERS) or select_mismatch(hf_config)

    def projector(self, config: Any) -> nn.Module:
        from fms.models.llava_next import LlavaNextMultiModalProjector

        return LlavaNextMultiModalProjector(config)

    def composition(self, for_card: bool) -> CompositionConfig:
        config = super().composition(for_card)
        config.drop_class_token = self.hf_config.vision_feature_select_strategy == "default"
        return config

    def warmup_image_sizes(self) -> list[tuple[int, int]]:
        side = self.hf_config.vision_config.image_size
        return [(side, side)]

    def feature_pieces(
        self, model: FmsModel, mm_kwargs: Mapping[str, Any]
    ) -> Pieces[list[torch.Tensor]]:
        # One at a time: the graph that the warmup made for one picture then serves any number.
        features = []
        for pixels in mm_kwargs["pixel_values"]:
            states = yield from model.select_hidden_states(pixels.unsqueeze(0))
            features.append(model.multi_modal_projector(states)[0])
        return features

    def feature_layout(self, mm_kwargs: Mapping[str, Any]) -> FeatureLayout | None:
        if "pixel_values" not in mm_kwargs:
            return None
        vision = self.hf_config.vision_config
        side = vision.image_size // vision.patch_size
        kept = self.hf_config.vision_feature_select_strategy == "full"
        first = int(kept and vision.model_type == "clip_vision_model")
        return FeatureLayout(first + side * side, FeatureGrid(first, side, side, side))

# SPDX-License-Identifier: Apache-2.0
"""Mistral 3: Pixtral's tower for images of any size, squares of patches merged into features."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vllm_spyre_mm.model_executor.models.composition import CompositionConfig
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.model_executor.spec import FmsModel
from vllm_spyre_mm.multimodal.feature_layout import FeatureGrid, FeatureLayout
from vllm_spyre_mm.multimodal.mm_mappings.vision_language import (
    VisionLanguageMapping,
    first_mismatch,
)


class Mistral3(VisionLanguageMapping):
    """Mistral 3 with a Mistral or a Ministral 3 decoder.

    The processor scales an image down to the longest side that it allows and up to whole squares of
    ``spatial_merge_size`` patches a side. Each square is one feature; in the prompt, tokens that
    are text to the decoder stand between the rows and at the end.
    """

    config_classes = (
        "transformers.Mistral3Config",
        "fms.Mistral3Config",
        "fms.Ministral3Config",
    )
    summary = "mistral3: Pixtral vision, Mistral or Ministral 3 decoder"
    takes_embeddings = False  # the tokens between the rows need the picture's size

    @classmethod
    def why_not(cls, hf_config: Any) -> str | None:
        if not isinstance(hf_config.vision_feature_layer, int):
            return "vision_feature_layer is a list, and the projector's norm takes one layer"
        return first_mismatch(hf_config, ("pixtral",), ("mistral", "ministral3"))

    @property
    def square(self) -> int:
        """Pixels on the side of what becomes one feature."""
        return self.hf_config.vision_config.patch_size * self.hf_config.spatial_merge_size

    @property
    def longest_side(self) -> int:
        """Pixels that the tower has positions for: ``image_size``, rounded up to whole squares."""
        return -(-self.hf_config.vision_config.image_size // self.square) * self.square

    def projector(self, config: Any) -> nn.Module:
        from fms.models.mistral3 import Mistral3MultiModalProjector

        return Mistral3MultiModalProjector(config)

    def composition(self, for_card: bool) -> CompositionConfig:
        config = super().composition(for_card)
        config.vision_config.image_size = self.longest_side  # type: ignore[union-attr]
        config.spatial_merge_size = self.hf_config.spatial_merge_size
        return config

    def warmup_image_sizes(self) -> list[tuple[int, int]]:
        # Larger than the processor should allow, to find at the start one that allows too much. The
        # number of patches is dynamic; the smallest picture is one square.
        return [(2 * self.longest_side, 2 * self.longest_side), (self.square, self.square)]

    def feature_pieces(
        self, model: FmsModel, mm_kwargs: Mapping[str, Any]
    ) -> Pieces[list[torch.Tensor]]:
        features = []
        for pixels in mm_kwargs["pixel_values"]:
            features.append((yield from self._encode(model, pixels)))
        return features

    def feature_layout(self, mm_kwargs: Mapping[str, Any]) -> FeatureLayout | None:
        if "pixel_values" not in mm_kwargs:
            return None
        height, width = mm_kwargs["pixel_values"].data.shape[-2:]
        rows, columns = height // self.square, width // self.square
        return FeatureLayout(rows * columns, FeatureGrid(0, rows, columns, columns))

    def _encode(self, model: FmsModel, pixels: torch.Tensor) -> Pieces[torch.Tensor]:
        height, width = pixels.shape[-2:]
        if max(height, width) > self.longest_side:
            raise ValueError(
                f"the processor makes images of {width}x{height} pixels, but the tower has "
                f"positions for {self.longest_side}: set size.longest_edge in the checkpoint's "
                "processor configuration to the tower's image_size"
            )
        states = yield from model.select_hidden_states(pixels.unsqueeze(0))
        features: torch.Tensor = model.multi_modal_projector(states[0], [(height, width)])
        return features

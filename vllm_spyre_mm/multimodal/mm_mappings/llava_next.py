# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Next: an image as a base tile and a grid of tiles, each through a vision tower."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from vllm_spyre_mm.model_executor.models.composition import (
    NEWLINE,
    CompositionConfig,
    TiledComposition,
)
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.model_executor.spec import FmsModel, LoadOverrides
from vllm_spyre_mm.multimodal.feature_layout import FeatureGrid, FeatureLayout
from vllm_spyre_mm.multimodal.mm_mappings.decoder import JOINED_PATCHES
from vllm_spyre_mm.multimodal.mm_mappings.vision_language import (
    TILE_TOWERS,
    VisionLanguageMapping,
    first_mismatch,
    select_mismatch,
)


class LlavaNext(VisionLanguageMapping):
    """LLaVA-Next with one vision feature layer.

    An image is a *base* tile (the whole picture) and a grid of tiles at a higher resolution. Its
    features are those of the base tile, then the grid's row by row without the padding that was
    added to keep the aspect ratio, a learnt *newline* feature after each row.
    """

    config_classes: ClassVar[tuple[str, ...]] = (
        "transformers.LlavaNextConfig",
        "fms.LlavaNextConfig",
    )
    summary = "llava_next: SigLIP or CLIP vision, one feature layer"
    model_class = TiledComposition

    @classmethod
    def why_not(cls, hf_config: Any) -> str | None:
        if not isinstance(hf_config.vision_feature_layer, int):
            return "it takes one vision_feature_layer, not several"
        return llava_next_mismatch(hf_config)

    @property
    def tile_side(self) -> int:
        """Features on the side of a tile."""
        vision = self.hf_config.vision_config
        return vision.image_size // vision.patch_size

    @property
    def encoder_batch_values(self) -> int:
        return JOINED_PATCHES * 3 * self.hf_config.vision_config.patch_size**2

    def projector(self, config: Any) -> nn.Module:
        from fms.models.llava_next import LlavaNextMultiModalProjector

        return LlavaNextMultiModalProjector(config)

    def composition(self, for_card: bool) -> CompositionConfig:
        config = super().composition(for_card)
        config.drop_class_token = self.hf_config.vision_feature_select_strategy == "default"
        config.newline = True
        config.image_grid_pinpoints = self.hf_config.image_grid_pinpoints
        return config

    def load_overrides(self, for_card: bool = False) -> LoadOverrides:
        overrides = super().load_overrides(for_card)
        return dataclasses.replace(overrides, encoder_modules=(*overrides.encoder_modules, NEWLINE))

    def warmup_image_sizes(self) -> list[tuple[int, int]]:
        # The number of tiles is a dynamic dimension from 2 up: the largest and the smallest grid.
        areas = sorted(self.hf_config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
        return [(width, height) for height, width in (areas[-1], areas[0])]

    def feature_pieces(
        self, model: FmsModel, mm_kwargs: Mapping[str, Any]
    ) -> Pieces[list[torch.Tensor]]:
        image_sizes = mm_kwargs["image_sizes"].tolist()
        side = self.hf_config.vision_config.image_size
        # The processor pads an image's tiles to the most that any image of its prompt has.
        tiles = [
            pixels[
                : model.image_size_to_num_patches(size, self.hf_config.image_grid_pinpoints, side)
            ]
            for pixels, size in zip(mm_kwargs["pixel_values"], image_sizes, strict=True)
        ]
        encoded = yield from self.encode_tiles(model, torch.cat(tiles))
        per_image = encoded.split([len(each) for each in tiles])
        return [
            self.pack(model, features, size)
            for features, size in zip(per_image, image_sizes, strict=True)
        ]

    def pack(self, model: FmsModel, tiles: torch.Tensor, size: list[int]) -> torch.Tensor:
        """Features ``(num_features, hidden_size)`` of an image of that height and width.

        Args:
            model: the FMS model.
            tiles: ``(tiles, patches, hidden_size)``, the base tile first.
            size: ``(height, width)`` of the picture in pixels.
        """
        return model.pack_image_features([tiles], [size], model.image_newline)

    def feature_layout(self, mm_kwargs: Mapping[str, Any]) -> FeatureLayout | None:
        if "image_sizes" not in mm_kwargs:
            return None
        height, width = mm_kwargs["image_sizes"].data.tolist()
        return self.layout_of(width, height)

    def tile_grid(self, mm_kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
        height, width = mm_kwargs["image_sizes"].data.tolist()
        return self._tiles_of(width, height)

    def _tiles_of(self, width: int, height: int) -> tuple[int, int]:
        from transformers.image_processing_utils import select_best_resolution

        side = self.hf_config.vision_config.image_size
        best = select_best_resolution((height, width), self.hf_config.image_grid_pinpoints)
        return best[0] // side, best[1] // side

    def fine_extents(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the fine grid of a picture of that size in pixels.

        The grid of tiles loses the rows or columns that were padding; a picture that is very narrow
        leaves none of them.
        """
        from transformers.models.llava_next.modeling_llava_next import unpad_image

        extents = (count * self.tile_side for count in self._tiles_of(width, height))
        tiles = torch.empty(1, *extents, device="meta")
        _, rows, columns = unpad_image(tiles, (height, width)).shape
        return rows, columns

    def layout_of(self, width: int, height: int) -> FeatureLayout:
        """The layout of a picture of that size in pixels."""
        side = self.tile_side
        rows, columns = self.fine_extents(width, height)
        base = FeatureGrid(start=0, rows=side, columns=side, stride=side)
        fine = FeatureGrid(start=side * side, rows=rows, columns=columns, stride=columns + 1)
        return FeatureLayout(
            num_features=side * side + rows * (columns + 1),
            base=base,
            fine=fine if rows and columns else None,
        )


def llava_next_mismatch(config: Any) -> str | None:
    """First property of a ``llava_next`` configuration that would not be honoured, or None."""
    mismatch = first_mismatch(config, TILE_TOWERS) or select_mismatch(config)
    if mismatch is not None:
        return mismatch
    vision = config.vision_config
    if vision.model_type == "clip_vision_model" and config.vision_feature_select_strategy == "full":
        return "vision_feature_select_strategy is 'full', but a class token has no place in a grid"
    return pinpoint_mismatch(config)


def pinpoint_mismatch(config: Any) -> str | None:
    """Why a grid of tiles would not be made of whole tiles, or None."""
    tile = config.vision_config.image_size
    for pinpoint in config.image_grid_pinpoints:
        if any(side <= 0 or side % tile for side in pinpoint):
            return f"image_grid_pinpoints has {pinpoint}, no multiple of {tile}"
    return None

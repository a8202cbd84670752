# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: LLaVA-Next whose large grids of tiles are shrunk, and videos."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from vllm_spyre_mm.model_executor.models.composition import TiledComposition
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.model_executor.spec import FmsModel
from vllm_spyre_mm.multimodal.feature_layout import FeatureGrid, FeatureLayout
from vllm_spyre_mm.multimodal.mm_mappings.llava_next import LlavaNext, llava_next_mismatch

MOST_TILES = 9
ASPECT_RATIO = f"anyres_max_{MOST_TILES}"
"""The only ``vision_aspect_ratio`` by which vLLM counts the features of a picture."""

SHRUNK_ABOVE = 1.1
"""A grid is shrunk if its side is so many times that of a square of :data:`MOST_TILES` tiles."""

POOLED = 2
"""Patches on the side of a square of a frame that becomes about one feature."""


def shrunk(rows: int, columns: int, tile_side: int) -> tuple[int, int]:
    """Rows and columns of the features that are made of a grid of as many patches.

    Args:
        rows: of patches, without padding.
        columns: of patches, without padding.
        tile_side: patches on the side of a tile.
    """
    ratio = math.sqrt(rows * columns / (MOST_TILES * tile_side**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > SHRUNK_ABOVE else (rows, columns)


class ShrinkingComposition(TiledComposition):
    """A composition that shrinks a grid of tiles to about :data:`MOST_TILES` of them."""

    def unpad_image(self, tensor: torch.Tensor, original_image_size: list[int]) -> torch.Tensor:
        """Patches without padding, interpolated if they are too many.

        Args:
            tensor: ``(hidden_size, rows, columns)`` of the grid of tiles.
            original_image_size: ``(height, width)`` of the picture in pixels.

        Returns:
            ``(hidden_size, rows, columns)`` of the features.
        """
        unpadded: torch.Tensor = super().unpad_image(tensor, original_image_size)
        vision: Any = self.config.vision_config
        _, rows, columns = unpadded.shape
        wanted = shrunk(rows, columns, vision.image_size // vision.patch_size)
        if wanted == (rows, columns):
            return unpadded
        return F.interpolate(unpadded.unsqueeze(0), size=wanted, mode="bilinear")[0]


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: pictures as those of LLaVA-Next, with fewer features, and videos.

    Each frame of a video is one square; its patches are interpolated to half as many rows and
    columns. One newline feature stands behind the last frame.
    """

    config_classes = ("transformers.LlavaOnevisionConfig",)
    summary = "llava_onevision: SigLIP or CLIP vision, tiles, pictures and video"
    model_class = ShrinkingComposition

    @classmethod
    def why_not(cls, hf_config: Any) -> str | None:
        if hf_config.vision_aspect_ratio != ASPECT_RATIO:
            given = hf_config.vision_aspect_ratio
            return f"vision_aspect_ratio {given!r} is not implemented, only {ASPECT_RATIO!r}"
        stride = getattr(hf_config, "spatial_pool_stride", POOLED)
        if stride != POOLED:
            return f"spatial_pool_stride {stride} is not implemented, only {POOLED}"
        return llava_next_mismatch(hf_config)

    @property
    def feature_token_ids(self) -> Mapping[str, int]:
        return {"image": self.image_token_id, "video": self.hf_config.video_token_index}

    @property
    def embedding_modalities(self) -> tuple[str, ...]:
        return ("image",)  # vLLM's processor has no field for a video's features

    @property
    def frame_side(self) -> int:
        """Features on the side of a video's frame."""
        return -(-self.tile_side // POOLED)

    def fine_extents(self, width: int, height: int) -> tuple[int, int]:
        return shrunk(*super().fine_extents(width, height), self.tile_side)

    def feature_pieces(
        self, model: FmsModel, mm_kwargs: Mapping[str, Any]
    ) -> Pieces[list[torch.Tensor]]:
        if "pixel_values_videos" not in mm_kwargs:
            return (yield from super().feature_pieces(model, mm_kwargs))
        features = []
        for frames in mm_kwargs["pixel_values_videos"]:
            features.append((yield from self._encode_video(model, frames)))
        return features

    def _encode_video(self, model: FmsModel, frames: torch.Tensor) -> Pieces[torch.Tensor]:
        """Features ``(num_features, hidden_size)`` of ``(frames, channels, side, side)``."""
        # The graphs of the warmup are for two tiles and more: one frame alone is encoded twice.
        given = frames if len(frames) > 1 else frames.repeat(2, 1, 1, 1)
        pooled = []
        for part in self.parts(given):
            pooled.append(self._pool((yield from self.encode_part(model, part))))
        newline = model.image_newline.unsqueeze(0)
        return torch.cat([*torch.cat(pooled)[: len(frames)], newline.to(pooled[0].dtype)])

    def _pool(self, patches: torch.Tensor) -> torch.Tensor:
        """Features ``(frames, features, hidden_size)`` of ``(frames, patches, hidden_size)``."""
        grid = patches.transpose(1, 2).unflatten(2, (self.tile_side, self.tile_side))
        pooled = F.interpolate(grid, size=(self.frame_side, self.frame_side), mode="bilinear")
        return pooled.flatten(2).transpose(1, 2)

    def feature_layout(self, mm_kwargs: Mapping[str, Any]) -> FeatureLayout | None:
        if "pixel_values_videos" not in mm_kwargs:
            return super().feature_layout(mm_kwargs)
        side, frames = self.frame_side, len(mm_kwargs["pixel_values_videos"].data)
        grid = FeatureGrid(0, side, side, side)
        return FeatureLayout(frames * side * side + 1, grid, frames=frames)

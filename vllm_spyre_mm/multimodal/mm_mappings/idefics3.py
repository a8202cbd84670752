# SPDX-License-Identifier: Apache-2.0
"""Idefics 3 and SmolVLM: a picture as a grid of full tiles and a global one, patches shuffled."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vllm_spyre_mm.model_executor.models.composition import DECODER, PROJECTOR, TOWER
from vllm_spyre_mm.model_executor.models.decoders import decoder_mismatch
from vllm_spyre_mm.model_executor.models.idefics3_vision import (
    PixelShuffleProjector,
    buckets_are_positions,
)
from vllm_spyre_mm.model_executor.models.names import renamed
from vllm_spyre_mm.model_executor.models.towers import tower_mismatch
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.model_executor.spec import FmsModel
from vllm_spyre_mm.multimodal.feature_layout import FeatureGrid, FeatureLayout
from vllm_spyre_mm.multimodal.mm_mappings.vision_language import (
    VisionLanguageMapping,
    kind_mismatch,
)

PARTS = (
    (r"^vision_model\.", f"{TOWER}.vision_model."),
    (r"^connector\.modality_projection\.", f"{PROJECTOR}."),
    (r"^text_model\.", f"{DECODER}."),
)
"""The names of the parts in a checkpoint, and here."""

WARMUP_ASPECT = 16
"""Width over height of the warmup's narrow picture, which is one row of tiles."""


class Idefics3(VisionLanguageMapping):
    """Idefics 3, SmolVLM and Granite Docling.

    The processor scales a picture to a grid of full tiles, whatever its size, and adds the whole
    picture as a *global* tile. In the prompt, tokens that are text to the decoder stand before and
    behind each tile's features; a placeholder begins with them.
    """

    config_classes = ("transformers.Idefics3Config", "transformers.SmolVLMConfig")
    summary = "idefics3, smolvlm: SigLIP vision with pixel shuffle, tiles"
    takes_embeddings = False  # the tokens between the tiles need the picture's size

    @classmethod
    def why_not(cls, hf_config: Any) -> str | None:
        vision, scale = hf_config.vision_config, hf_config.scale_factor
        mismatch = (
            kind_mismatch(hf_config, ("idefics3_vision", "smolvlm_vision"))
            or tower_mismatch(vision, [vision.num_hidden_layers])
            or decoder_mismatch(hf_config.text_config)
        )
        if mismatch is not None:
            return mismatch
        side = vision.image_size // vision.patch_size
        if side % scale:
            return f"scale_factor {scale} does not divide the {side} patches on the side of a tile"
        if not buckets_are_positions(side):
            return (
                f"vision_config.image_size {vision.image_size} gives {side} patches on a side, for "
                "which Transformers' rounding gives several of them the same position"
            )
        return None

    @property
    def image_token_id(self) -> int:
        return self.hf_config.image_token_id

    @property
    def feature_layers(self) -> list[int]:
        return [self.hf_config.vision_config.num_hidden_layers]

    @property
    def tile_features(self) -> int:
        """Features on the side of a tile."""
        vision = self.hf_config.vision_config
        return vision.image_size // vision.patch_size // self.hf_config.scale_factor

    def projector(self, config: Any) -> nn.Module:
        return PixelShuffleProjector(
            self.hf_config.vision_config.hidden_size,
            self.text_config.hidden_size,
            self.hf_config.scale_factor,
        )

    def rename(self, name: str) -> str:
        return super().rename(renamed(name.removeprefix("model."), PARTS))

    def warmup_image_sizes(self) -> list[tuple[int, int]]:
        # The processor scales every picture up: the most tiles, and one row of them. Their number
        # is a dynamic dimension from 2 up.
        side = self.hf_config.vision_config.image_size
        return [(side, side), (side, max(1, side // WARMUP_ASPECT))]

    def warmup_processor_kwargs(self) -> dict[str, Any]:
        # Two tiles in a row and the global one, the least that is more than one.
        side = self.hf_config.vision_config.image_size
        return {
            "do_image_splitting": True,
            "size": {"longest_edge": 2 * side},
            "max_image_size": {"longest_edge": side},
        }

    def feature_pieces(
        self, model: FmsModel, mm_kwargs: Mapping[str, Any]
    ) -> Pieces[list[torch.Tensor]]:
        counts = mm_kwargs["num_patches"].flatten().tolist()  # vLLM's name of tiles
        self._check_tiles(mm_kwargs)
        tiles = _joined(mm_kwargs["pixel_values"]).split(counts)
        features = []
        for pixels in tiles:
            encoded = yield from self.encode_tiles(model, pixels)
            features.append(encoded.flatten(0, 1))
        return features

    def _check_tiles(self, mm_kwargs: Mapping[str, Any]) -> None:
        """Check that tiles are full: padding would need a mask, and its patches other positions.

        Raises:
            ValueError: they are of another size, or padded.
        """
        side = self.hf_config.vision_config.image_size
        shape = tuple(mm_kwargs["pixel_values"][0].shape[-2:])
        if shape != (side, side):
            raise ValueError(
                f"the processor makes tiles of {shape[1]}x{shape[0]} pixels, but the tower takes "
                f"{side}x{side}: set max_image_size.longest_edge in the checkpoint's processor "
                "configuration to the tower's image_size"
            )
        if not all(bool(mask.all()) for mask in mm_kwargs["pixel_attention_mask"]):
            raise ValueError(
                "the processor pads tiles (pixel_attention_mask has zeros), but only full ones are "
                "computed exactly: use the image processor that Transformers has for this model"
            )

    def tile_grid(self, mm_kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
        rows, columns = mm_kwargs["tile_grid"].data.tolist()
        return (rows, columns) if rows and columns else None

    def feature_layout(self, mm_kwargs: Mapping[str, Any]) -> FeatureLayout | None:
        if "tile_grid" not in mm_kwargs:
            return None
        side = self.tile_features
        rows, columns = mm_kwargs["tile_grid"].data.tolist()
        before = rows * columns * side * side
        return FeatureLayout(
            num_features=before + side * side,
            base=FeatureGrid(before, side, side, side),
            fine=FeatureGrid(0, rows * side, columns * side, side, side) if before else None,
        )


def _joined(pixels: Any) -> torch.Tensor:
    """Tiles of all pictures, ``(tiles, 3, side, side)``, from one tensor or one for each."""
    return pixels if isinstance(pixels, torch.Tensor) else torch.cat(list(pixels))

# SPDX-License-Identifier: Apache-2.0
"""Adds the grid of tiles to what vLLM's processor of Idefics 3 and SmolVLM makes of a picture.

vLLM hands over how many tiles a picture has, not their rows and columns.

Leans on: ``_postprocess_hf_mm_data`` gets the pictures and sets ``num_patches``, the tiles of each;
``info._get_image_feature_grid_size`` computes their number, rows and columns from a picture's size.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo

TILE_GRID = "tile_grid"
"""int64 ``(images, 2)``: rows and columns of tiles besides the global one, 0 for none."""


class TileGrids(BaseMultiModalProcessor[BaseProcessingInfo]):
    """Gives each picture its :data:`TILE_GRID`, and checks the number of its tiles.

    vLLM's own computes how many tiles a picture has, and may be wrong: it would then take tiles
    away from a picture, or give it those of another.
    """

    info: Any

    def _postprocess_hf_mm_data(
        self,
        mm_inputs: Mapping[str, Any],
        hf_processor_mm_kwargs: Mapping[str, Any],
        processed_data: Any,
    ) -> Any:
        processed = super()._postprocess_hf_mm_data(
            mm_inputs, hf_processor_mm_kwargs, processed_data
        )
        if "num_patches" not in processed:
            return processed
        items = self.info.parse_mm_data({"image": mm_inputs["images"]}, validate=False)["image"]
        sizes = [items.get_image_size(index) for index in range(len(items))]
        processor = self.info.get_hf_processor(**hf_processor_mm_kwargs)
        grids = [
            self.info._get_image_feature_grid_size(
                image_width=size.width,
                image_height=size.height,
                processor=processor,
                mm_kwargs=hf_processor_mm_kwargs,
            )[1:]
            for size in sizes
        ]
        made, expected = len(processed["pixel_values"]), int(processed["num_patches"].sum())
        if made != expected:
            raise ValueError(
                f"the processor makes {made} tiles of images that have {expected} in the prompt: "
                "size.longest_edge has to be a multiple of max_image_size.longest_edge"
            )
        processed[TILE_GRID] = torch.tensor(grids)
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(  # type: ignore[safe-super]  # a mixin's
            hf_inputs, hf_processor_mm_kwargs
        )
        return {**fields, TILE_GRID: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}


def makes_grids(processor: Any) -> bool:
    """Whether a processor of vLLM's is one whose pictures get a :data:`TILE_GRID`."""
    idefics3 = sys.modules.get("vllm.model_executor.models.idefics3")  # loaded if it has been made
    return idefics3 is not None and isinstance(processor, idefics3.Idefics3MultiModalProcessor)

# SPDX-License-Identifier: Apache-2.0
"""Granite Vision: LLaVA-Next whose features are several layers of the tower side by side."""

from typing import Any

from vllm_spyre_mm.multimodal.mm_mappings.llava_next import LlavaNext, llava_next_mismatch


class GraniteVision(LlavaNext):
    """LLaVA-Next with a list of vision feature layers, concatenated before the projector."""

    summary = "llava_next: SigLIP or CLIP vision, several feature layers"

    @classmethod
    def why_not(cls, hf_config: Any) -> str | None:
        if isinstance(hf_config.vision_feature_layer, int):
            return "it takes a list of vision_feature_layers, not one"
        return llava_next_mismatch(hf_config)

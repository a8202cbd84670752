# SPDX-License-Identifier: Apache-2.0
"""Random Qwen-VL towers, of this project and of Transformers, with the same weights."""

from typing import Any

import torch
from fms.utils.serialization import get_adapted
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from tests import qwen_vl
from vllm_spyre_mm.model_executor.models.qwen_vision import ARCHITECTURE, QwenVision
from vllm_spyre_mm.model_executor.models.qwen_vision_config import qwen_vision_config

REFERENCES: dict[str, Any] = {
    "qwen3_vl": Qwen3VLVisionModel,
    "qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel,
    "qwen2_vl": Qwen2VisionTransformerPretrainedModel,
}


def vision_config(model_type: str, **changes: Any) -> Any:
    """The tower's part of one of ``tests.qwen_vl``'s configurations, with changes."""
    dotted = {f"vision_config.{name}": value for name, value in changes.items()}
    return getattr(qwen_vl, model_type)(**dotted).vision_config


def random_reference(model_type: str, vision: Any) -> nn.Module:
    """Transformers' tower with weights that let every part have an effect."""
    reference: nn.Module = REFERENCES[model_type]._from_config(vision).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            is_norm = "norm" in name or "ln_q" in name
            mean = 1.0 if is_norm and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.15, generator=generator)
    return reference


def same_tower(reference: nn.Module, vision: Any, *, fused: bool = True) -> QwenVision:
    """This project's tower with the weights of Transformers'."""
    config = qwen_vision_config(vision)
    config.fused_weights = fused
    tower = QwenVision(config)
    state = dict(reference.state_dict())
    tower.load_state_dict(get_adapted(ARCHITECTURE, "hf", state, {"model_config": config}))
    return tower.eval().requires_grad_(False)


def reference_features(
    reference: nn.Module, pixel_values: torch.Tensor, grids: torch.Tensor
) -> torch.Tensor:
    """Transformers' features, those of the levels beside those of the input."""
    output = reference(pixel_values, grids)
    levels = getattr(output, "deepstack_features", None) or []
    return torch.cat([output.pooler_output, *levels], dim=-1)


def random_pixels(grids: torch.Tensor, vision: Any) -> torch.Tensor:
    """Patches of items with these grids."""
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    generator = torch.Generator().manual_seed(len(grids))
    return torch.randn(int(grids.prod(-1).sum()), values, generator=generator)

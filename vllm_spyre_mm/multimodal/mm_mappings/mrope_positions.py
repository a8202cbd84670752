# SPDX-License-Identifier: Apache-2.0
"""Positions on three axes, as vLLM's model classes compute them from a prompt and its grids."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


def mrope_positions(
    config: Any, token_ids: list[int], mm_features: "Sequence[MultiModalFeatureSpec]"
) -> tuple[torch.Tensor, int]:
    """Positions of a prompt of a Qwen-VL model.

    Args:
        config: the Transformers configuration of the whole model: ``qwen2_vl``, ``qwen2_5_vl`` or
            ``qwen3_vl``.
        token_ids: of the prompt, placeholders expanded.
        mm_features: its pictures and videos; of their data only grids and times are read.

    Returns:
        int64 ``(3, len(token_ids))``, and what is to be added to the index of a later token.
    """
    model_class = _model_class(config.model_type)
    # The method reads the configuration alone, so that the model need not be built.
    model = model_class.__new__(model_class)
    model.__dict__["config"] = config
    return model.get_mrope_input_positions(input_tokens=token_ids, mm_features=list(mm_features))


def _model_class(model_type: str) -> Any:
    """vLLM's class of the model."""
    from vllm.model_executor.models import qwen2_5_vl, qwen2_vl, qwen3_vl

    return {
        "qwen2_vl": qwen2_vl.Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": qwen2_5_vl.Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": qwen3_vl.Qwen3VLForConditionalGeneration,
    }[model_type]

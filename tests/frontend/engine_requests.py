# SPDX-License-Identifier: Apache-2.0
"""Requests as vLLM's front end makes them of prompts."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.frontend.request_validation import (
    validate_engine_request,
)

MODEL_CONFIG: Any = SimpleNamespace(
    multimodal_config=None, hf_config=AutoConfig.from_pretrained(checkpoint_path())
)
IMAGE = MODEL_CONFIG.hf_config.image_token_id
WORD = IMAGE + 1


def request(tokens: list[int] | None, *places: tuple[int, int], **fields: Any) -> EngineCoreRequest:
    """What vLLM's front end makes of a prompt.

    Args:
        tokens: of the prompt, expanded.
        places: offset and length of each picture's placeholder.
        fields: other fields of the request.
    """
    features = [
        MultiModalFeatureSpec(None, "image", f"hash{i}", PlaceholderRange(*place))
        for i, place in enumerate(places)
    ]
    return EngineCoreRequest(
        request_id="a",
        prompt_token_ids=tokens,
        mm_features=features or None,
        sampling_params=SamplingParams(),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        **fields,
    )


def sentence(tokens: list[int] | None, *places: tuple[int, int], **fields: Any) -> str:
    """With which a request is refused."""
    with pytest.raises(VLLMValidationError) as error:
        validate_engine_request(request(tokens, *places, **fields), MODEL_CONFIG)
    return str(error.value)

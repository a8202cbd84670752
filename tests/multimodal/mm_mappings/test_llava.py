# SPDX-License-Identifier: Apache-2.0
"""LLaVA 1.5: CLIP and Llama without tiles."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PixtralVisionConfig, PretrainedConfig, Qwen2MoeConfig

from tests import architectures
from tests.multimodal.mm_mappings.suite import FP32, MappingSuite, assert_close, picture
from tests.reference import Reference
from vllm_spyre_mm.model_executor.loader import load_model
from vllm_spyre_mm.multimodal.mm_mappings import Llava, UnsupportedModelError, get_mm_mapping


class TestLlava(MappingSuite):
    mapping_class = Llava

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        config = architectures.llava(
            architectures.llama(num_attention_heads=1, num_key_value_heads=1)
        )
        return architectures.save_checkpoint(tmp_path_factory.mktemp("llava"), config)

    @pytest.fixture
    def other(self) -> Any:
        return architectures.llava_next(architectures.llama())

    def mm_kwargs(self, config: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {"pixel_values": inputs["pixel_values"]}

    def test_the_warmup_picture_is_the_towers_square(self, config: Any):
        (size,) = Llava(config).warmup_image_sizes()
        assert size == (config.vision_config.image_size, config.vision_config.image_size)


VARIANTS: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "the class token kept": (
        architectures.llama(),
        {"vision_feature_select_strategy": "full"},
    ),
    "several layers": (architectures.llama(), {"vision_feature_layer": [-2, 1]}),
    "Mistral": (architectures.mistral(), {}),
    "Granite": (architectures.granite(tie_word_embeddings=True), {}),
    "SigLIP": (
        architectures.llama(),
        {"vision_config": architectures.siglip(), "vision_feature_select_strategy": "full"},
    ),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_what_a_configuration_may_vary_is_honoured(tmp_path: Path, variant: str):
    text, changes = VARIANTS[variant]
    checkpoint = architectures.save_checkpoint(tmp_path, architectures.llava(text, **changes))
    mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
    model, reference = load_model(mapping, checkpoint, FP32), Reference(checkpoint)
    suite, images = TestLlava(), [picture(100, 60), picture(30, 70)]
    features = torch.cat(suite.features(mapping, model, reference, images))
    assert_close(features, reference.features(suite.prompt(reference, 2), images), 1e-4)
    assert_close(*suite.logits(mapping, model, reference, images), 1e-4)


REFUSED: dict[str, dict[str, Any]] = {
    "vision_config.model_type 'pixtral'": {"vision_config": PixtralVisionConfig()},
    "text_config.model_type 'qwen2_moe'": {"text_config": Qwen2MoeConfig()},
    "vision_feature_select_strategy is 'default'": {"vision_config": architectures.siglip()},
    "projector_hidden_act 'relu'": {"projector_hidden_act": "relu"},
    "vision_feature_layer 9": {"vision_feature_layer": 9},
}


@pytest.mark.parametrize("named", list(REFUSED))
def test_what_would_not_be_honoured_is_refused_by_name(named: str):
    with pytest.raises(UnsupportedModelError) as error:
        get_mm_mapping(architectures.llava(architectures.llama(), **REFUSED[named]))
    assert named in str(error.value)

# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Next as most checkpoints are: CLIP's tower, its class token left out, and many decoders."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig
from transformers import CLIPVisionModel as TransformersCLIP

from tests import architectures
from tests.checkpoints import llava_next_config, with_changes
from tests.multimodal.mm_mappings.llava_next_suite import LlavaNextSuite
from tests.multimodal.mm_mappings.suite import FP32, assert_close, picture
from tests.reference import Reference
from vllm_spyre_mm.model_executor.loader import load_model
from vllm_spyre_mm.model_executor.models.clip_vision import CLIPVision
from vllm_spyre_mm.model_executor.models.towers import TOWERS
from vllm_spyre_mm.multimodal.mm_mappings import (
    GraniteVision,
    LlavaNext,
    UnsupportedModelError,
    get_mm_mapping,
)


class ClipSuite(LlavaNextSuite):
    """CLIP with a decoder."""

    mapping_class = LlavaNext
    text: ClassVar[PretrainedConfig]

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("clip")
        return architectures.save_checkpoint(path, architectures.llava_next(cls.text))

    @pytest.fixture
    def other(self) -> Any:
        return with_changes(llava_next_config(), {"vision_feature_layer": [-1, -2]})


class TestClipAndMistral(ClipSuite):
    text = architectures.mistral(head_dim=128)


class TestClipAndLlama(ClipSuite):
    text = architectures.llama(num_attention_heads=1, num_key_value_heads=1)


VARIANTS: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "the embeddings alone": (architectures.llama(), {"vision_feature_layer": 0}),
    "the last layer": (architectures.llama(), {"vision_feature_layer": -1}),
    "several layers": (architectures.llama(), {"vision_feature_layer": [-2, 1]}),
    "the exact gelu": (architectures.llama(), {"vision_config.hidden_act": "gelu"}),
    "no bias in the projector": (architectures.mistral(), {"multimodal_projector_bias": False}),
    "a tied head": (architectures.llama(tie_word_embeddings=True), {}),
    "biases": (architectures.llama(attention_bias=True, mlp_bias=True), {}),
    "Llama 3's rotation": (
        architectures.llama(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        ),
        {},
    ),
    "another rotation": (
        architectures.mistral(rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
        {},
    ),
    "a window longer than any prompt": (architectures.mistral(sliding_window=8192), {}),
    "Qwen 2": (architectures.qwen2(), {}),
    "Qwen 3": (architectures.qwen3(), {}),
    "Qwen 3 with a tied head": (architectures.qwen3(tie_word_embeddings=True), {}),
    "Granite": (architectures.granite(), {}),
    "Granite with biases": (architectures.granite(mlp_bias=True), {}),
    "Granite with narrow heads": (architectures.granite(head_dim=48), {}),
    "Ministral 3": (architectures.ministral3(), {}),
    "SigLIP": (
        architectures.llama(),
        {"vision_config": architectures.siglip(), "vision_feature_select_strategy": "full"},
    ),
    "patches that leave a rest": (
        architectures.llama(),
        {"vision_config": architectures.clip(patch_size=7)},
    ),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_what_a_configuration_may_vary_is_honoured(tmp_path: Path, variant: str):
    """Features and logits, any tower with any decoder."""
    text, changes = VARIANTS[variant]
    config = architectures.llava_next(text, **changes)
    checkpoint = architectures.save_checkpoint(tmp_path, config)
    mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
    assert type(mapping) is (GraniteVision if variant == "several layers" else LlavaNext)
    model, reference = load_model(mapping, checkpoint, FP32), Reference(checkpoint)
    suite, images = TestClipAndLlama(), [picture(100, 60), picture(30, 70)]
    features = torch.cat(suite.features(mapping, model, reference, images))
    assert_close(features, reference.features(suite.prompt(reference, 2), images), 1e-4)
    assert_close(*suite.logits(mapping, model, reference, images), 1e-4)


REFUSED: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "vision_feature_select_strategy is 'full'": (
        architectures.llama(),
        {"vision_feature_select_strategy": "full"},
    ),
    "vision_feature_select_strategy is 'default', but the tower": (
        architectures.llama(),
        {"vision_config": architectures.siglip()},
    ),
    "vision_feature_layer is empty": (architectures.llama(), {"vision_feature_layer": []}),
    "text_config.sliding_window 4096": (architectures.mistral(sliding_window=4096), {}),
    "text_config.head_dim 48": (architectures.llama(head_dim=48), {}),
    "text_config.attention_bias": (architectures.qwen3(attention_bias=True), {}),
    "text_config.sliding_window 64": (
        architectures.qwen3(use_sliding_window=True, sliding_window=64, max_window_layers=1),
        {},
    ),
    "text_config.rope_type 'yarn'": (
        architectures.llama(
            rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
        ),
        {},
    ),
}


@pytest.mark.parametrize("named", list(REFUSED))
def test_what_would_not_be_honoured_is_refused_by_name(named: str):
    text, changes = REFUSED[named]
    with pytest.raises(UnsupportedModelError) as error:
        get_mm_mapping(architectures.llava_next(text, **changes))
    assert named in str(error.value)


def test_heads_that_cannot_be_padded_for_the_card_are_refused():
    mapping = get_mm_mapping(architectures.llava_next(architectures.mistral(head_dim=64)))
    with pytest.raises(UnsupportedModelError, match="heads of 64 cannot be padded to the 128"):
        mapping.kv_cache_options(for_card=True)
    with pytest.raises(UnsupportedModelError, match="heads of 64 cannot be padded to the 128"):
        mapping.load_overrides(for_card=True)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_every_hidden_state_of_the_tower_is_that_of_transformers(act: str):
    config = architectures.clip(hidden_act=act)
    torch.manual_seed(0)
    reference = TransformersCLIP(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, 0.3)
    own = TOWERS["clip_vision_model"].config(config, config.num_hidden_layers)
    tower = CLIPVision(own)
    from fms.utils.serialization import get_adapted

    state = {
        name: tensor
        for name, tensor in reference.state_dict().items()
        if "post_layernorm" not in name
    }
    tower.load_state_dict(get_adapted("clip_vision", "hf", state, {"model_config": own}))
    pixels = torch.randn(3, 3, architectures.SIDE, architectures.SIDE)
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True).hidden_states
        found = list(tower(pixels))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 1e-5)

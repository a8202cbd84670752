# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Next with one feature layer: a random checkpoint with an untied head."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests.checkpoints import llava_next_config, save_random_checkpoint
from tests.multimodal.mm_mappings.llava_next_suite import LlavaNextSuite
from tests.multimodal.mm_mappings.suite import FP32, assert_close, picture
from tests.reference import Reference
from vllm_spyre_mm.model_executor.loader import load_model
from vllm_spyre_mm.multimodal.mm_mappings import LlavaNext, get_mm_mapping

VARIANTS = {
    "the embeddings alone": {"vision_feature_layer": 0},
    "a layer counted from the front": {"vision_feature_layer": 2},
    "the last layer": {"vision_feature_layer": -1},
    "the exact gelu": {"vision_config.hidden_act": "gelu"},
    "as many KV heads as heads": {"text_config.num_key_value_heads": 4},
    "one KV head": {"text_config.num_key_value_heads": 1},
    "narrow heads": {"text_config.head_dim": 32},
    "widths that are no round multiple": {
        "text_config.intermediate_size": 301,
        "vision_config.intermediate_size": 203,
    },
    "other epsilons": {"text_config.rms_norm_eps": 1e-2, "vision_config.layer_norm_eps": 1e-2},
    "other multipliers": {
        "text_config.embedding_multiplier": 3.0,
        "text_config.attention_multiplier": 0.3,
        "text_config.residual_multiplier": 0.7,
        "text_config.logits_scaling": 5.0,
    },
    "another rotation": {
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 300_000.0}
    },
    "a tied head": {"tie_word_embeddings": True, "text_config.tie_word_embeddings": True},
}


class TestLlavaNext(LlavaNextSuite):
    mapping_class = LlavaNext

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, llava_next_checkpoint: Path) -> Path:
        return llava_next_checkpoint

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, llava_next_reference: Reference) -> Reference:
        return llava_next_reference

    @pytest.fixture
    def other(self, demo_checkpoint: Path) -> Any:
        return AutoConfig.from_pretrained(demo_checkpoint)

    @pytest.mark.parametrize("variant", list(VARIANTS))
    def test_what_a_configuration_may_vary_is_honoured(self, tmp_path: Path, variant: str):
        """Features and logits, for what FMS does read from a configuration."""
        config = llava_next_config(**VARIANTS[variant])
        checkpoint = save_random_checkpoint(tmp_path, config)
        mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
        assert type(mapping) is LlavaNext
        model, reference = load_model(mapping, checkpoint, FP32), Reference(checkpoint)
        images = [picture(100, 60)]
        (features,) = self.features(mapping, model, reference, images)
        assert_close(features, reference.features(self.prompt(reference, 1), images), 1e-4)
        assert_close(*self.logits(mapping, model, reference, images), 1e-4)

    def test_a_tile_need_not_be_a_whole_number_of_patches(self, tmp_path: Path):
        """Granite Vision 3.x has tiles of 384 and patches of 14: the last 6 pixels are not read."""
        side, pinpoints = 52, [[52, 52], [52, 104], [104, 104]]
        config = llava_next_config(
            vision_config__image_size=side, image_grid_pinpoints=pinpoints, image_seq_length=36
        )
        checkpoint = save_random_checkpoint(tmp_path, config)
        for name in ("preprocessor_config.json", "processor_config.json"):
            content = json.loads((checkpoint / name).read_text())
            image = content.get("image_processor", content)
            image["size"] = image["crop_size"] = {"height": side, "width": side}
            image["image_grid_pinpoints"] = pinpoints
            (checkpoint / name).write_text(json.dumps(content))
        mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
        model, reference = load_model(mapping, checkpoint, FP32), Reference(checkpoint)
        images = [picture(100, 60)]
        (features,) = self.features(mapping, model, reference, images)
        assert_close(features, reference.features(self.prompt(reference, 1), images), 1e-4)
        assert_close(*self.logits(mapping, model, reference, images), 1e-4)

    def test_one_layer_in_a_list_is_another_mappings(self, config: Any):
        config.vision_feature_layer = [-2]
        assert "vision_feature_layer" in str(LlavaNext.why_not(config))
        assert type(get_mm_mapping(config)) is not LlavaNext

    @pytest.mark.parametrize(("layer", "expected"), [(-1, [4]), (-2, [3]), (0, [0]), (-5, [0])])
    def test_feature_layers_are_counted_from_the_front(
        self, config: Any, layer: int, expected: list[int]
    ):
        config.vision_feature_layer = layer
        assert LlavaNext(config).feature_layers == expected

    def test_layers_above_the_feature_layer_are_not_built(self, config: Any, model: Any):
        assert config.vision_config.num_hidden_layers == 4
        assert len(model.vision_tower.base_model.encoder.layers) == 3

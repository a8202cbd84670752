# SPDX-License-Identifier: Apache-2.0
"""Granite Vision: the trained checkpoint that the package ships, with a tied head."""

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import llava_next_config, save_random_checkpoint
from tests.multimodal.mm_mappings.llava_next_suite import LlavaNextSuite
from tests.multimodal.mm_mappings.suite import FP32, assert_close, picture
from tests.reference import Reference
from vllm_spyre_mm.model_executor.loader import load_model
from vllm_spyre_mm.multimodal.mm_mappings import GraniteVision, get_mm_mapping


class TestGraniteVision(LlavaNextSuite):
    mapping_class = GraniteVision

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, demo_checkpoint: Path) -> Path:
        return demo_checkpoint

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, demo_reference: Reference) -> Reference:
        return demo_reference

    @pytest.fixture
    def other(self) -> Any:
        return llava_next_config()

    def test_a_single_layer_is_another_mappings(self, config: Any):
        config.vision_feature_layer = -2
        assert "vision_feature_layers" in str(GraniteVision.why_not(config))
        assert type(get_mm_mapping(config)) is not GraniteVision

    def test_feature_layers_are_counted_from_the_front(self, config: Any):
        assert config.vision_config.num_hidden_layers == 5
        config.vision_feature_layer = [-5, 3, -1]
        assert GraniteVision(config).feature_layers == [1, 3, 5]

    @pytest.mark.parametrize("layers", [[-2], [1, 3], [3, 1], [2, 2], [0, -1]], ids=str)
    def test_layers_go_side_by_side_in_the_given_order(self, tmp_path: Path, layers: list[int]):
        config = llava_next_config(vision_feature_layer=layers)
        checkpoint = save_random_checkpoint(tmp_path, config)
        mapping = get_mm_mapping(config)
        assert type(mapping) is GraniteVision
        model, reference = load_model(mapping, checkpoint, FP32), Reference(checkpoint)
        images = [picture(100, 60)]
        (features,) = self.features(mapping, model, reference, images)
        assert_close(features, reference.features(self.prompt(reference, 1), images), 1e-4)

# SPDX-License-Identifier: Apache-2.0
"""Mistral 3: Pixtral, the patch merger, and Mistral or Ministral 3."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from tests import architectures
from tests.multimodal.mm_mappings.suite import FP32, MappingSuite, assert_close, picture
from tests.reference import Reference
from vllm_spyre_mm.model_executor.loader import load_model
from vllm_spyre_mm.multimodal.mm_mappings import Mistral3, UnsupportedModelError, get_mm_mapping


class Mistral3Suite(MappingSuite):
    mapping_class = Mistral3
    text: ClassVar[PretrainedConfig]

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        config = architectures.mistral3(cls.text)
        return architectures.save_checkpoint(tmp_path_factory.mktemp("mistral3"), config)

    @pytest.fixture
    def other(self) -> Any:
        return architectures.llava(architectures.mistral())

    def mm_kwargs(self, config: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Each picture's own pixels: the processor pads all to the largest, vLLM does not."""
        pixels = [
            padded[:, :height, :width]
            for padded, (height, width) in zip(
                inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True
            )
        ]
        same = len({each.shape for each in pixels}) == 1
        return {"pixel_values": torch.stack(pixels) if same else pixels}

    def test_warmup_pictures_are_one_square_and_the_largest(
        self, mapping: Mistral3, reference: Reference
    ):
        sizes = []
        for width, height in mapping.warmup_image_sizes():
            images = [picture(width, height)]
            inputs = reference.inputs(self.prompt(reference, 1), images)
            sizes.append(tuple(inputs["image_sizes"][0].tolist()))
        assert sizes == [(mapping.longest_side,) * 2, (mapping.square,) * 2]

    def test_a_picture_with_as_many_patches_as_the_tower_has_heads(
        self, mapping: Mistral3, model: Any, reference: Reference
    ):
        """FMS's own attention takes the one for the other."""
        heads = mapping.hf_config.vision_config.num_attention_heads
        assert mapping.hf_config.spatial_merge_size**2 == heads
        images = [picture(mapping.square, mapping.square), picture(50, 40)]
        features = self.features(mapping, model, reference, images)
        assert len(features[0]) == 1
        expected = reference.features(self.prompt(reference, 2), images)
        assert_close(torch.cat(features), expected, 1e-4)

    def test_a_processor_that_allows_larger_images_is_refused(self, mapping: Mistral3, model: Any):
        pixels = torch.zeros(1, 3, mapping.square, mapping.longest_side + mapping.square)
        with pytest.raises(ValueError, match=r"images of 112x16 pixels.*positions for 96"):
            mapping.compute_features(model, {"pixel_values": pixels})


class TestMistral3(Mistral3Suite):
    text = architectures.mistral(head_dim=128)


class TestMinistral3(Mistral3Suite):
    text = architectures.ministral3(head_dim=128)


VARIANTS: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "the embeddings alone": (architectures.mistral(), {"vision_feature_layer": 0}),
    "a layer in the middle": (architectures.mistral(), {"vision_feature_layer": -2}),
    "larger squares": (architectures.mistral(), {"spatial_merge_size": 3}),
    "no merging": (architectures.mistral(), {"spatial_merge_size": 1}),
    "a bias in the projector": (architectures.mistral(), {"multimodal_projector_bias": True}),
    "gelu in the tower": (architectures.mistral(), {"vision_config.hidden_act": "gelu"}),
    "another rotation in the tower": (
        architectures.mistral(),
        {"vision_config.rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}},
    ),
    "an image size that is no whole square": (
        architectures.mistral(),
        {"vision_config.image_size": 90},
    ),
    "a tied head": (architectures.mistral(tie_word_embeddings=True), {}),
    "another epsilon": (architectures.mistral(rms_norm_eps=1e-2), {}),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_what_a_configuration_may_vary_is_honoured(tmp_path: Path, variant: str):
    text, changes = VARIANTS[variant]
    checkpoint = architectures.save_checkpoint(tmp_path, architectures.mistral3(text, **changes))
    mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
    model, reference = load_model(mapping, checkpoint, FP32), Reference(checkpoint)
    suite, images = TestMistral3(), [picture(100, 60), picture(30, 70)]
    features = torch.cat(suite.features(mapping, model, reference, images))
    assert_close(features, reference.features(suite.prompt(reference, 2), images), 1e-4)
    assert_close(*suite.logits(mapping, model, reference, images), 1e-4)


REFUSED: dict[str, dict[str, Any]] = {
    "vision_config.model_type 'clip_vision_model'": {"vision_config": architectures.clip()},
    "text_config.model_type 'llama'": {"text_config": architectures.llama()},
    "projector_hidden_act 'relu'": {"projector_hidden_act": "relu"},
    "vision_feature_layer is a list": {"vision_feature_layer": [-1]},
    "vision_config.hidden_act 'relu'": {"vision_config.hidden_act": "relu"},
    "vision_config.head_dim 32": {"vision_config.head_dim": 32},
    "text_config.sliding_window 4096": {"text_config.sliding_window": 4096},
}


@pytest.mark.parametrize("named", list(REFUSED))
def test_what_would_not_be_honoured_is_refused_by_name(named: str):
    with pytest.raises(UnsupportedModelError) as error:
        get_mm_mapping(architectures.mistral3(architectures.mistral(), **REFUSED[named]))
    assert named in str(error.value)

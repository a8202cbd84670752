# SPDX-License-Identifier: Apache-2.0
"""Granite Vision 4: levels of features from windowed Q-Formers, into several decoder layers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Dinov2Config, GraniteConfig

from tests import architectures, granite4_vision
from tests.checkpoints import with_changes
from tests.multimodal.mm_mappings.llava_next_suite import LlavaNextSuite
from tests.multimodal.mm_mappings.suite import FP32, assert_close, picture
from tests.reference import Reference
from vllm_spyre_mm.model_executor.loader import load_model
from vllm_spyre_mm.multimodal.merge import TEXT
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils, UnsupportedModelError, get_mm_mapping
from vllm_spyre_mm.multimodal.mm_mappings.granite4_vision import Granite4Vision

WIDTH, LEVELS = 128, granite4_vision.LEVELS

VARIANTS = {
    "no depths, the corners alone": {
        "deepstack_layer_map": [],
        "spatial_target_layers": [0, 1, 2, 3],
    },
    "embeddings, and layers counted from the front": {
        "deepstack_layer_map": [[0, 3], [2, 0]],
        "spatial_vision_layer": 3,
    },
    "the smallest windows": {"downsample_rate": "1/2"},
    "one window": {"downsample_rate": "4/8"},
    "two layers in a Q-Former": {"qformer_config.num_hidden_layers": 2},
    "other sizes of a Q-Former": {
        "qformer_config.num_attention_heads": 6,
        "qformer_config.intermediate_size": 100,
        "qformer_config.layer_norm_eps": 1e-2,
    },
    "the exact gelu in the tower": {"vision_config.hidden_act": "gelu"},
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
    "a decoder under its own name": {
        "text_config": GraniteConfig(
            **{k: v for k, v in granite4_vision.DECODER.items() if k != "model_type"}
        )
    },
}

REFUSED = {
    "vision_config.model_type 'dinov2'": {"vision_config": Dinov2Config()},
    "text_config.model_type 'llama'": {"text_config": architectures.llama()},
    "text_config.num_local_experts 4": {
        "text_config": architectures.granite4(num_hidden_layers=6, num_local_experts=4)
    },
    "text_config.layer_types has 'linear_attention'": {
        "text_config": architectures.granite4(
            num_hidden_layers=6, layer_types=["linear_attention"] + ["full_attention"] * 5
        )
    },
    "adapter_path 'lora'": {"adapter_path": "lora"},
    "use_spatial_sampling is False": {"use_spatial_sampling": False},
    "use_image_newline_parameter is False": {"use_image_newline_parameter": False},
    "spatial_stride 4": {"spatial_stride": 4},
    "deepstack_layer_map is missing": {"deepstack_layer_map": None},
    "deepstack_layer_map 5 is outside": {"deepstack_layer_map": [[5, 0]]},
    "spatial_vision_layer -6 is outside": {"spatial_vision_layer": -6},
    "spatial_target_layers has 3 layers": {"spatial_target_layers": [1, 2, 4]},
    "decoder layer 6, but the last one is 5": {"deepstack_layer_map": [[0, 6]]},
    "decoder layer -1": {"deepstack_layer_map": [[0, -1]]},
    "several levels go to decoder layer 2": {"deepstack_layer_map": [[0, 2]]},
    "downsample_rate '3/8'": {"downsample_rate": "3/8"},
    "downsample_rate None": {"downsample_rate": None},
    "downsample_rate '3/6'": {"downsample_rate": "3/6"},
    "qformer_config.hidden_size 192": {"qformer_config.hidden_size": 192},
    "qformer_config.encoder_hidden_size 48": {"qformer_config.encoder_hidden_size": 48},
    "qformer_config.hidden_act relu": {"qformer_config.hidden_act": "relu"},
    "qformer_config.cross_attention_frequency 2": {"qformer_config.cross_attention_frequency": 2},
    "qformer_config.use_qformer_text_input True": {"qformer_config.use_qformer_text_input": True},
    "qformer_config.hidden_size is no multiple": {"qformer_config.num_attention_heads": 7},
    "vision_feature_select_strategy is 'default'": {"vision_feature_select_strategy": "default"},
    "vision_config.hidden_act 'relu'": {"vision_config.hidden_act": "relu"},
    "text_config.hidden_act 'relu'": {"text_config.hidden_act": "relu"},
    "text_config.attention_bias": {"text_config.attention_bias": True},
    "image_grid_pinpoints has [48, 50]": {"image_grid_pinpoints": [[48, 48], [48, 50]]},
}


class Granite4VisionSuite(LlavaNextSuite):
    mapping_class = Granite4Vision

    def test_each_level_is_that_of_transformers(
        self, mapping: MMUtils, model: Any, reference: Reference
    ):
        images = [picture(150, 90), picture(64, 200)]
        features = torch.cat(self.features(mapping, model, reference, images))
        expected = reference.features(self.prompt(reference, 2), images)
        assert features.shape[1] == mapping.feature_width == LEVELS * WIDTH
        levels = zip(features.split(WIDTH, 1), expected.split(WIDTH, 1), strict=True)
        assert [assert_close(*level, 1e-4) for level in levels] == [None] * LEVELS

    def test_features_are_cast_to_the_decoders_dtype_when_they_are_merged(self, mapping: MMUtils):
        text = torch.ones(1, 3, WIDTH, dtype=torch.bfloat16)
        features = torch.arange(1.0, 1 + LEVELS).repeat_interleave(WIDTH).expand(2, -1)
        index = torch.tensor([[0, TEXT, 1]])
        merged = mapping.merge(text, features, index)
        assert merged.dtype == torch.bfloat16
        assert merged[0, :, 0].tolist() == [0, 1, 0]
        levels = mapping.merge_levels(text, features, index)
        assert all(level.dtype == torch.bfloat16 for level in levels)
        assert [level[0, :, -1].tolist() for level in levels] == [
            [number, 0, number] for number in range(1, 1 + LEVELS)
        ]

    @pytest.mark.parametrize("named", list(REFUSED))
    def test_what_fms_would_not_honour_is_refused_by_name(self, config: Any, named: str):
        refused = with_changes(config, REFUSED[named])
        with pytest.raises(UnsupportedModelError, match="granite4_vision") as error:
            get_mm_mapping(refused)
        assert named in str(error.value)

    @pytest.mark.parametrize("beyond", [lambda last: last + 1, lambda last: -last - 2])
    def test_a_feature_layer_outside_the_tower_is_refused(self, config: Any, beyond: Any):
        layer = beyond(config.vision_config.num_hidden_layers)
        refused = with_changes(config, {"deepstack_layer_map": [[layer, 0]]})
        with pytest.raises(UnsupportedModelError, match=f"deepstack_layer_map {layer} is outside"):
            get_mm_mapping(refused)

    @pytest.mark.parametrize("layout", ["vision_model", "bare"])
    def test_the_names_that_older_transformers_wrote_are_known(
        self, checkpoint: Path, model: Any, tmp_path: Path, layout: str
    ):
        """With another part in a tower's names, and without the prefix of all but the head."""
        older = shutil.copytree(checkpoint, tmp_path / "older")
        tensors = load_file(older / "model.safetensors")
        renamed = {
            name.replace("vision_tower.", "vision_tower.vision_model.")
            if layout == "vision_model"
            else name.removeprefix("model."): tensor
            for name, tensor in tensors.items()
        }
        assert renamed.keys() != tensors.keys()
        save_file(renamed, older / "model.safetensors", metadata={"format": "pt"})
        state = load_model(get_mm_mapping(AutoConfig.from_pretrained(older)), older, FP32)
        for name, tensor in state.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name


class TestGranite4Vision(Granite4VisionSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        config = granite4_vision.granite4_vision()
        return architectures.save_checkpoint(tmp_path_factory.mktemp("granite4"), config)

    @pytest.fixture
    def other(self) -> Any:
        return architectures.llava_next(architectures.granite())

    @pytest.mark.parametrize("variant", list(VARIANTS))
    def test_what_a_configuration_may_vary_is_honoured(self, tmp_path: Path, variant: str):
        config = granite4_vision.granite4_vision(**VARIANTS[variant])
        checkpoint = architectures.save_checkpoint(tmp_path, config)
        mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
        model, reference = load_model(mapping, checkpoint, FP32), Reference(checkpoint)
        images = [picture(100, 60)]
        (features,) = self.features(mapping, model, reference, images)
        assert_close(features, reference.features(self.prompt(reference, 1), images), 1e-4)
        assert_close(*self.logits(mapping, model, reference, images), 1e-4)


class TestWithHybridDecoder(Granite4VisionSuite):
    """A dense ``granitemoehybrid`` as the decoder, as Granite 4 micro is one.

    Transformers builds Granite Vision 4's own decoder whatever the configuration says, and has no
    place for this one's tensors. So the reference has the same numbers under that decoder's names.
    """

    @pytest.fixture(scope="class")
    @classmethod
    def twin(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        config = granite4_vision.granite4_vision()
        return architectures.save_checkpoint(tmp_path_factory.mktemp("twin"), config)

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("hybrid") / "model"
        return granite4_vision.save_with_hybrid_decoder(path, twin)

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, twin: Path) -> Reference:
        return Reference(twin)

    @pytest.fixture
    def other(self) -> Any:
        return architectures.llava_next(architectures.granite4())

    def test_the_decoder_is_the_hybrid_one(self, config: Any, checkpoint: Path) -> None:
        assert config.text_config.model_type == "granitemoehybrid"
        names = load_file(checkpoint / "model.safetensors")
        assert not any(".gate_proj." in name for name in names)

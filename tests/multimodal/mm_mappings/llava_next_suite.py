# SPDX-License-Identifier: Apache-2.0
"""What every mapping with LLaVA-Next's tiles has to pass. A test module subclasses the suite."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, PixtralVisionConfig, Qwen2MoeConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tests.checkpoints import with_changes
from tests.multimodal.mm_mappings.suite import MappingSuite, picture
from tests.multimodal.mm_mappings.text_suite import assert_close
from tests.reference import Reference
from vllm_spyre_mm.multimodal.mm_mappings import (
    MAPPINGS,
    MM_CFG_MAPPING,
    MMUtils,
    UnsupportedModelError,
    config_name,
    get_mm_mapping,
)

REFUSED = {
    "vision_config.model_type 'dinov2'": {"vision_config": Dinov2Config()},
    "vision_config.model_type 'pixtral'": {"vision_config": PixtralVisionConfig()},
    "text_config.model_type 'qwen2_moe'": {"text_config": Qwen2MoeConfig()},
    "projector_hidden_act": {"projector_hidden_act": "relu"},
    "rope_type 'dynamic'": {
        "text_config.rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    },
    "rope_type 'linear'": {
        "text_config.rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    },
    "text_config.partial_rotary_factor": {
        "text_config.rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        }
    },
    "text_config.hidden_act 'relu'": {"text_config.hidden_act": "relu"},
    "text_config.num_attention_heads": {"text_config.num_key_value_heads": 3},
    "vision_config.hidden_act 'relu'": {"vision_config.hidden_act": "relu"},
    "vision_config.num_channels": {"vision_config.num_channels": 1},
    "vision_config.patch_size": {"vision_config.patch_size": [8, 8]},
    "vision_config.hidden_size": {"vision_config.num_attention_heads": 7},
    "image_grid_pinpoints has [48, 50]": {"image_grid_pinpoints": [[48, 48], [48, 50]]},
    "image_grid_pinpoints has [0, 48]": {"image_grid_pinpoints": [[48, 48], [0, 48]]},
}
"""What would not be honoured: the name that the refusal has to give, and how to provoke it."""


class LlavaNextSuite(MappingSuite):
    """What every mapping of a ``llava_next`` configuration has to pass besides."""

    def mm_kwargs(self, config: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Each picture's own tiles: the processor pads all to the most of them, vLLM does not."""
        counts = [
            image_size_to_num_patches(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
            for size in inputs["image_sizes"]
        ]
        tiles = [
            pixels[:count] for pixels, count in zip(inputs["pixel_values"], counts, strict=True)
        ]
        same = len(set(counts)) == 1
        return {
            "pixel_values": torch.stack(tiles) if same else tiles,
            "image_sizes": inputs["image_sizes"],
        }

    @pytest.mark.parametrize("named", list(REFUSED))
    def test_what_fms_would_not_honour_is_refused_by_name(self, config: Any, named: str):
        refused = with_changes(config, REFUSED[named])
        for mapping in MM_CFG_MAPPING[config_name(config)]:
            assert mapping.why_not(refused) is not None
        with pytest.raises(UnsupportedModelError, match="llava_next") as error:
            get_mm_mapping(refused)
        property_name, _, _ = named.partition(" '")
        assert property_name in str(error.value)
        if "'" in named:
            assert named[named.index("'") :] in str(error.value)
        for mapping in MAPPINGS:
            assert f"{mapping.__name__} ({mapping.summary})" in str(error.value)

    @pytest.mark.parametrize("beyond", [lambda last: last + 1, lambda last: -last - 2])
    def test_a_feature_layer_outside_the_tower_is_refused(self, config: Any, beyond: Any):
        layer = beyond(config.vision_config.num_hidden_layers)
        layers = config.vision_feature_layer
        changed = layer if isinstance(layers, int) else [*layers[:-1], layer]
        refused = with_changes(config, {"vision_feature_layer": changed})
        with pytest.raises(UnsupportedModelError, match=f"vision_feature_layer {layer} is outside"):
            get_mm_mapping(refused)

    def test_every_grid_of_tiles_has_the_features_of_transformers(
        self, mapping: MMUtils, model: Any, reference: Reference
    ):
        grids = mapping.hf_config.image_grid_pinpoints
        assert len(grids) > 10
        for height, width in grids:
            images = [picture(width - 1, height - 1)]
            inputs = reference.inputs(self.prompt(reference, 1), images)
            best = select_best_resolution((height - 1, width - 1), grids)
            assert list(best) == [height, width], "another grid is taken: the test proves less"
            (features,) = mapping.compute_features(model, self.mm_kwargs(mapping.hf_config, inputs))
            assert_close(features, reference.features(self.prompt(reference, 1), images), 1e-4)

    def test_tiles_that_only_pad_a_picture_to_its_neighbours_are_ignored(
        self, mapping: MMUtils, model: Any, reference: Reference
    ):
        """The processor's own output, when it is given several pictures at once."""
        inputs = reference.inputs(self.prompt(reference, 2), [picture(230, 50), picture(40, 40)])
        trimmed = self.mm_kwargs(mapping.hf_config, inputs)
        padded = {**trimmed, "pixel_values": inputs["pixel_values"]}
        assert len(padded["pixel_values"][1]) > len(trimmed["pixel_values"][1])
        pairs = zip(
            mapping.compute_features(model, padded),
            mapping.compute_features(model, trimmed),
            strict=True,
        )
        assert all(torch.equal(*pair) for pair in pairs)

    def test_warmup_pictures_are_the_largest_and_the_smallest_grid(self, mapping: MMUtils):
        grid = mapping.hf_config.image_grid_pinpoints
        sizes = mapping.warmup_image_sizes()
        assert all([height, width] in grid for width, height in sizes)
        areas = [height * width for height, width in grid]
        assert {width * height for width, height in sizes} == {max(areas), min(areas)}

    def test_pixels_as_one_tensor_and_as_a_list_give_the_same(
        self, mapping: MMUtils, model: Any, reference: Reference
    ):
        inputs = reference.inputs(self.prompt(reference, 2), [picture(90, 48), picture(80, 40)])
        stacked = self.mm_kwargs(mapping.hf_config, inputs)
        assert isinstance(stacked["pixel_values"], torch.Tensor)
        listed = {**stacked, "pixel_values": list(stacked["pixel_values"])}
        pairs = zip(
            mapping.compute_features(model, stacked),
            mapping.compute_features(model, listed),
            strict=True,
        )
        assert all(torch.equal(*pair) for pair in pairs)

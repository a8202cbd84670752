# SPDX-License-Identifier: Apache-2.0
"""What every mapping has to pass. A mapping's test module subclasses a suite and fills it in.

Transformers on the same checkpoint is the reference for everything that is computed.
"""

import copy
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, Dinov2Config, PixtralVisionConfig, Qwen2MoeConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tests.checkpoints import Layout, rename_tensors, with_changes
from tests.reference import Reference
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.model_executor.parts import ModelPart
from vllm_spyre_mm.multimodal.merge import TEXT
from vllm_spyre_mm.multimodal.mm_mappings import (
    MAPPINGS,
    MM_CFG_MAPPING,
    MMUtils,
    UnsupportedModelError,
    config_name,
    get_mm_mapping,
)

FP32 = LoadOptions(decoder_dtype=torch.float32, encoder_dtype=torch.float32)
BF16 = LoadOptions(decoder_dtype=torch.bfloat16, encoder_dtype=torch.bfloat16)


def picture(width: int, height: int) -> Image.Image:
    """Noise on a gradient: every tile differs from every other."""
    generator = np.random.default_rng(width * 10_007 + height)
    rows = np.linspace(0, 160, height)[:, None, None]
    columns = np.linspace(0, 60, width)[None, :, None]
    pixels = rows + columns + generator.uniform(0, 35, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """No element is off by more than ``tolerance`` times the largest one."""
    assert actual.shape == expected.shape
    error = (actual.float() - expected.float()).abs().max()
    assert error <= tolerance * expected.float().abs().max()


class TextMappingSuite:
    """Tests of one mapping; subclasses say which, and give the fixtures that raise here.

    A mapping that takes pictures has to pass :class:`MappingSuite`.
    """

    mapping_class: ClassVar[type[MMUtils]]

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls) -> Path:
        """Folder of a small checkpoint that the mapping serves."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, checkpoint: Path) -> Reference:
        """Transformers on that checkpoint, fp32."""
        return Reference(checkpoint)

    @pytest.fixture
    def other(self) -> Any:
        """A configuration that another mapping serves."""
        raise NotImplementedError

    # -- given by the above ----------------------------------------------------------------------

    @pytest.fixture
    def config(self, checkpoint: Path) -> Any:
        return AutoConfig.from_pretrained(checkpoint)

    @pytest.fixture
    def mapping(self, config: Any) -> MMUtils:
        return get_mm_mapping(config)

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, checkpoint: Path) -> Any:
        """The loaded FMS model, fp32."""
        mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
        return load_model(mapping, checkpoint, FP32)

    def prompt(self, reference: Reference, num_images: int) -> str:
        tag = reference.processor.image_token if num_images else ""
        return "".join(f"Picture {i} {tag} and" for i in range(num_images)) + " what is it?"

    def inputs_embeds(
        self,
        mapping: MMUtils,
        model: Any,
        reference: Reference,
        inputs: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """What the decoder is given."""
        return mapping.embed_tokens(model, inputs["input_ids"])

    # -- which configurations ------------------------------------------------------------------

    def test_its_own_configuration_is_served_by_it_alone(self, config: Any):
        candidates = MM_CFG_MAPPING[config_name(config)]
        accepting = [mapping for mapping in candidates if mapping.why_not(config) is None]
        assert accepting == [self.mapping_class]
        assert type(get_mm_mapping(config)) is self.mapping_class

    def test_it_leaves_the_configuration_of_another_mapping_alone(self, other: Any):
        assert type(get_mm_mapping(other)) is not self.mapping_class
        if self.mapping_class in MM_CFG_MAPPING[config_name(other)]:
            assert self.mapping_class.why_not(other) is not None

    def test_its_configuration_classes_are_listed(self, config: Any):
        assert config_name(config) in self.mapping_class.config_classes
        for name in self.mapping_class.config_classes:
            assert self.mapping_class in MM_CFG_MAPPING[name]

    def test_what_it_serves_is_said_in_a_few_words(self):
        assert 0 < len(self.mapping_class.summary) < 80

    # -- purity --------------------------------------------------------------------------------

    def test_no_method_changes_the_configuration(self, config: Any, checkpoint: Path):
        before = copy.deepcopy(config.to_dict())
        self.mapping_class.why_not(config)
        mapping = get_mm_mapping(config)
        for for_card in (False, True):
            mapping.kv_cache_options(for_card)
            mapping.load_overrides(for_card)
        mapping.warmup_image_sizes()
        model = load_model(mapping, checkpoint, FP32)
        text = mapping.embed_tokens(model, torch.zeros(1, 4, dtype=torch.int64))
        mapping.merge(text, text[0], torch.full((1, 4), TEXT))
        assert config.to_dict() == before

    # -- the decoder -----------------------------------------------------------------------------

    def decoder_arguments(
        self, mapping: MMUtils, model: Any, inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """What the decoder is called with beside embeddings."""
        return {"position_ids": torch.arange(inputs["input_ids"].shape[1]).unsqueeze(0)}

    def logits(
        self, mapping: MMUtils, model: Any, reference: Reference, images: list[Image.Image]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of all positions, from FMS and from Transformers; no KV cache is involved."""
        inputs = reference.inputs(self.prompt(reference, len(images)), images)
        embeds = self.inputs_embeds(mapping, model, reference, inputs)
        arguments = self.decoder_arguments(mapping, model, inputs)
        with torch.inference_mode():
            ours = model(embeds, **arguments, attn_name="sdpa_causal")
            theirs = reference.model(**inputs).logits
        return ours, theirs / reference.logits_scaling

    def test_logits_of_a_text_are_those_of_transformers(
        self, mapping: MMUtils, model: Any, reference: Reference
    ):
        assert_close(*self.logits(mapping, model, reference, []), 1e-4)

    def test_logits_with_heads_padded_for_the_card_are_those_of_transformers(
        self, mapping: MMUtils, checkpoint: Path, reference: Reference
    ):
        options = LoadOptions(torch.float32, torch.float32, for_card=True)
        model = load_model(mapping, checkpoint, options)
        assert_close(*self.logits(mapping, model, reference, []), 1e-4)

    # -- what the runner is told -----------------------------------------------------------------

    def attention_modules(self, mapping: MMUtils, model: Any, for_card: bool) -> list[Any]:
        blocks = mapping.load_overrides(for_card).decoder_blocks(model)
        return [block.attn for block in blocks]

    @pytest.mark.parametrize("for_card", [False, True])
    def test_the_kv_cache_has_the_shape_of_the_models_attention(
        self, mapping: MMUtils, checkpoint: Path, for_card: bool
    ):
        model = load_model(mapping, checkpoint, LoadOptions(torch.float32, torch.float32, for_card))
        options = mapping.kv_cache_options(for_card)
        modules = self.attention_modules(mapping, model, for_card)
        assert options.num_layers == len(modules)
        for attention in modules:
            assert attention.nheads == mapping.text_config.num_attention_heads
            assert attention.kvheads == options.num_kv_heads
            assert attention.emb_kq_per_head == options.head_dim
            assert attention.emb_v_per_head == options.head_dim

    def test_the_repeated_blocks_are_those_of_the_decoder(self, mapping: MMUtils, model: Any):
        decoder = mapping.load_overrides().decoder_blocks(model)
        assert len(decoder) == mapping.text_config.num_hidden_layers


class MappingSuite(TextMappingSuite):
    """Tests of a mapping that takes pictures."""

    def mm_kwargs(self, config: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """A Transformers processor's output as vLLM hands it to the runner, batched over images."""
        raise NotImplementedError

    def features(
        self, mapping: MMUtils, model: Any, reference: Reference, images: list[Image.Image]
    ) -> list[torch.Tensor]:
        inputs = reference.inputs(self.prompt(reference, len(images)), images)
        return mapping.compute_features(model, self.mm_kwargs(mapping.hf_config, inputs))

    def inputs_embeds(
        self,
        mapping: MMUtils,
        model: Any,
        reference: Reference,
        inputs: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        embeds = super().inputs_embeds(mapping, model, reference, inputs)
        if "pixel_values" not in inputs:
            return embeds
        features = mapping.compute_features(model, self.mm_kwargs(mapping.hf_config, inputs))
        return mapping.merge(embeds, torch.cat(features), self.feature_index(mapping, inputs))

    def feature_index(self, mapping: MMUtils, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The feature of each position, as for ``merge``."""
        is_image = inputs["input_ids"] == mapping.image_token_id
        return torch.where(is_image, is_image.cumsum(1) - 1, TEXT)

    def decoder_arguments(
        self, mapping: MMUtils, model: Any, inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        arguments = super().decoder_arguments(mapping, model, inputs)
        if mapping.feature_levels and "pixel_values" in inputs:
            text = mapping.embed_tokens(model, inputs["input_ids"])
            features = mapping.compute_features(model, self.mm_kwargs(mapping.hf_config, inputs))
            index = self.feature_index(mapping, inputs)
            arguments["deepstack"] = mapping.merge_levels(text, torch.cat(features), index)
        return arguments

    def test_inputs_are_not_written_to(self, mapping: MMUtils, model: Any, reference: Reference):
        inputs = reference.inputs(self.prompt(reference, 2), [picture(48, 48), picture(90, 40)])
        mm_kwargs = self.mm_kwargs(mapping.hf_config, inputs)
        before = copy.deepcopy(mm_kwargs)
        configuration = copy.deepcopy(mapping.hf_config.to_dict())
        mapping.compute_features(model, mm_kwargs)
        assert mapping.hf_config.to_dict() == configuration
        assert mm_kwargs.keys() == before.keys()
        for name, value in mm_kwargs.items():
            assert all(torch.equal(*pair) for pair in zip(value, before[name], strict=True))

    # -- checkpoints -----------------------------------------------------------------------------

    @pytest.mark.parametrize("layout", ["transformers4", "transformers4.52"])
    def test_the_names_that_older_transformers_wrote_are_known(
        self, checkpoint: Path, model: Any, tmp_path: Path, layout: Layout
    ):
        older = shutil.copytree(checkpoint, tmp_path / "older")
        rename_tensors(older, layout)
        state = load_model(get_mm_mapping(AutoConfig.from_pretrained(older)), older, FP32)
        for name, tensor in state.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name

    # -- features --------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "size",
        [(48, 48), (64, 64), (230, 50), (50, 230), (1, 1), (300, 20), (20, 300), (1000, 900)],
        ids=lambda size: f"{size[0]}x{size[1]}",
    )
    def test_features_of_a_picture_are_those_of_transformers(
        self, mapping: MMUtils, model: Any, reference: Reference, size: tuple[int, int]
    ):
        """Beside another picture: Transformers fails where a picture alone is one feature."""
        images = [picture(*size), picture(50, 40)]
        features = self.features(mapping, model, reference, images)
        assert all(each.dtype == torch.float32 for each in features)
        expected = reference.features(self.prompt(reference, 2), images)
        assert_close(torch.cat(features), expected, 1e-4)

    def test_there_is_one_feature_for_every_image_token(
        self, mapping: MMUtils, model: Any, reference: Reference
    ):
        for size in [(48, 48), (230, 50), (7, 90), (333, 222)]:
            inputs = reference.inputs(self.prompt(reference, 1), [picture(*size)])
            (features,) = self.features(mapping, model, reference, [picture(*size)])
            assert len(features) == (inputs["input_ids"] == mapping.image_token_id).sum()

    def test_the_layout_has_a_row_for_every_feature(
        self, mapping: MMUtils, model: Any, reference: Reference
    ):
        for size in [(48, 48), (230, 50), (7, 90), (333, 222)]:
            inputs = reference.inputs(self.prompt(reference, 1), [picture(*size)])
            mm_kwargs = self.mm_kwargs(mapping.hf_config, inputs)
            item = {name: SimpleNamespace(data=value[0]) for name, value in mm_kwargs.items()}
            layout = mapping.feature_layout(item)
            (features,) = self.features(mapping, model, reference, [picture(*size)])
            assert layout is not None
            assert layout.num_features == len(features)
            places = layout.places().tolist()
            assert len(places) == len(set(places))
            assert set(places) | set(layout.newlines()) == set(range(len(features)))
        assert mapping.feature_layout({"image_embeds": SimpleNamespace(data=features)}) is None

    def test_pictures_encoded_together_are_those_encoded_alone(
        self, mapping: MMUtils, model: Any, reference: Reference
    ):
        images = [picture(230, 50), picture(48, 48), picture(70, 140)]
        together = self.features(mapping, model, reference, images)
        assert len(together) == 3
        for features, image in zip(together, images, strict=True):
            (alone,) = self.features(mapping, model, reference, [image])
            assert_close(features, alone, 1e-5)
        assert_close(
            torch.cat(together), reference.features(self.prompt(reference, 3), images), 1e-4
        )

    def test_features_in_bf16_are_as_near_to_the_reference_as_those_of_transformers(
        self, mapping: MMUtils, checkpoint: Path, reference: Reference
    ):
        model = load_model(mapping, checkpoint, BF16)
        images = [picture(130, 60), picture(50, 50)]
        features = self.features(mapping, model, reference, images)
        assert all(feature.dtype == torch.bfloat16 for feature in features)
        prompt = self.prompt(reference, 2)
        expected = reference.features(prompt, images)
        theirs = Reference(checkpoint, torch.bfloat16).features(prompt, images)
        # Norms: the largest of many errors is another one with other weights.
        off, ours = (
            float((rows.float() - expected).norm() / expected.norm())
            for rows in (theirs, torch.cat(features))
        )
        assert off < 6e-2
        assert ours <= max(1e-2, 1.5 * off)

    def test_features_are_cast_to_the_decoders_dtype_when_they_are_merged(self, mapping: MMUtils):
        text, features = torch.zeros(1, 3, 4, dtype=torch.bfloat16), torch.ones(2, 4)
        merged = mapping.merge(text, features, torch.tensor([[0, TEXT, 1]]))
        assert merged.dtype == torch.bfloat16
        assert merged[0, :, 0].tolist() == [1, 0, 1]

    # -- the decoder -----------------------------------------------------------------------------

    @pytest.mark.parametrize("num_images", [1, 2])
    def test_logits_with_pictures_are_those_of_transformers(
        self, mapping: MMUtils, model: Any, reference: Reference, num_images: int
    ):
        images = [picture(120, 60), picture(40, 100)][:num_images]
        assert_close(*self.logits(mapping, model, reference, images), 1e-4)

    # -- what the runner is told -----------------------------------------------------------------

    def test_features_need_the_encoder_alone(
        self, mapping: MMUtils, model: Any, reference: Reference, checkpoint: Path
    ):
        options = dataclasses.replace(FP32, part=ModelPart.ENCODER)
        alone = load_model(mapping, checkpoint, options)
        images = [picture(120, 60), picture(40, 100)]
        found = self.features(mapping, alone, reference, images)
        expected = self.features(mapping, model, reference, images)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))

    def test_the_encoders_modules_are_parts_of_the_model(self, mapping: MMUtils, model: Any):
        parts = {name.partition(".")[0] for name, _ in model.named_parameters()}
        encoder = mapping.load_overrides().encoder_modules
        assert parts - set(encoder) == {"language_model"}
        assert set(encoder) < parts

    def test_the_encoders_blocks_are_alike_and_not_the_decoders(self, mapping: MMUtils, model: Any):
        overrides = mapping.load_overrides()
        encoder, decoder = overrides.encoder_blocks(model), overrides.decoder_blocks(model)
        assert len({type(block) for block in encoder}) == 1
        assert not set(encoder) & set(decoder)

    def test_warmup_pictures_fit_the_grid_and_can_be_encoded(
        self, mapping: MMUtils, model: Any, reference: Reference
    ):
        sizes = mapping.warmup_image_sizes()
        assert sizes
        for width, height in sizes:
            images = [picture(width, height)]
            inputs = reference.inputs(self.prompt(reference, 1), images)
            (features,) = self.features(mapping, model, reference, images)
            assert len(features) == (inputs["input_ids"] == mapping.image_token_id).sum()
            assert features.isfinite().all()


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

# SPDX-License-Identifier: Apache-2.0
"""What every mapping that takes pictures has to pass. A test module subclasses the suite.

Transformers on the same checkpoint is the reference for everything that is computed.
"""

import copy
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig

from tests.checkpoints import Layout, rename_tensors
from tests.multimodal.mm_mappings.text_suite import BF16, FP32, TextMappingSuite, assert_close
from tests.reference import Reference
from vllm_spyre_mm.model_executor.loader import load_model
from vllm_spyre_mm.model_executor.parts import ModelPart
from vllm_spyre_mm.multimodal.merge import TEXT
from vllm_spyre_mm.multimodal.mm_mappings import (
    MMUtils,
    get_mm_mapping,
)


def picture(width: int, height: int) -> Image.Image:
    """Noise on a gradient: every tile differs from every other."""
    generator = np.random.default_rng(width * 10_007 + height)
    rows = np.linspace(0, 160, height)[:, None, None]
    columns = np.linspace(0, 60, width)[None, :, None]
    pixels = rows + columns + generator.uniform(0, 35, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


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

    def test_pictures_are_encoded_in_pieces_of_at_most_a_layer(
        self, mapping: MMUtils, model: Any, reference: Reference
    ):
        """Two of them in turn: neither notices the other, and a layer computes no second time."""
        blocks = mapping.load_overrides().encoder_blocks(model)
        calls: list[nn.Module] = []
        hooks = [each.register_forward_hook(lambda *call: calls.append(call[0])) for each in blocks]
        given = [
            self.mm_kwargs(
                mapping.hf_config, reference.inputs(self.prompt(reference, 1), [picture(*size)])
            )
            for size in ((48, 48), (90, 40))
        ]
        under_way = {i: mapping.feature_pieces(model, each) for i, each in enumerate(given)}
        results: dict[int, list[torch.Tensor]] = {}
        while len(results) < len(given):
            for i in under_way.keys() - results.keys():
                before = len(calls)
                try:
                    next(under_way[i])
                except StopIteration as end:
                    results[i] = end.value
                assert len(calls) - before <= 1
        for hook in hooks:
            hook.remove()
        for i, each in enumerate(given):
            (features,), (expected,) = results[i], mapping.compute_features(model, each)
            assert torch.equal(features, expected)

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

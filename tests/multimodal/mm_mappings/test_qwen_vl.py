# SPDX-License-Identifier: Apache-2.0
"""Qwen-VL: three generations, with pictures, videos, depths and positions on three axes."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from vllm.multimodal.inputs import PlaceholderRange

from tests import architectures, qwen_vl
from tests.checkpoints import with_changes
from tests.multimodal.mm_mappings.suite import FP32, MappingSuite, assert_close, picture
from tests.reference import Reference
from tests.videos import video
from vllm_spyre_mm.model_executor.loader import load_model
from vllm_spyre_mm.model_executor.models.mrope import step_rope_of
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils, UnsupportedModelError, get_mm_mapping
from vllm_spyre_mm.multimodal.mm_mappings.qwen_vl import Qwen2VL, Qwen3VL, Qwen25VL, QwenVL


class QwenSuite(MappingSuite):
    mapping_class: ClassVar[type[QwenVL]]
    model_type: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        config = getattr(qwen_vl, cls.model_type)()
        return architectures.save_checkpoint(tmp_path_factory.mktemp(cls.model_type), config)

    @pytest.fixture
    def other(self) -> Any:
        return architectures.llava(architectures.llama())

    def prompt(self, reference: Reference, num_images: int) -> str:
        return "".join(f"Picture {i} {qwen_vl.IMAGE} and" for i in range(num_images)) + " what?"

    def mm_kwargs(self, config: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        return {name: inputs[name] for name in names if name in inputs}

    def positions(self, mapping: MMUtils, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """On three axes, as the worker asks for them."""
        token_ids = inputs["input_ids"][0].tolist()
        features, end = [], 0
        for grid in inputs.get("image_grid_thw", ()):
            start = token_ids.index(mapping.image_token_id, end)
            end = start + int(grid.prod()) // qwen_vl.MERGE**2
            position = PlaceholderRange(offset=start, length=end - start)
            data = {"image_grid_thw": SimpleNamespace(data=grid)}
            features.append(SimpleNamespace(modality="image", data=data, mm_position=position))
        found = mapping.positions(token_ids, features)
        assert found is not None
        return found[0]

    def decoder_arguments(
        self, mapping: MMUtils, model: Any, inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        rope = step_rope_of(mapping.load_overrides().decoder_blocks(model))
        assert rope is not None
        rotations = rope.rotations(self.positions(mapping, inputs))
        return super().decoder_arguments(mapping, model, inputs) | {"position_ids": rotations}

    @pytest.mark.parametrize("layout", ["model.visual", "visual"])
    def test_the_names_that_older_transformers_wrote_are_known(
        self, checkpoint: Path, model: Any, tmp_path: Path, layout: str
    ):
        """Transformers 5 writes either, by the generation."""
        older = shutil.copytree(checkpoint, tmp_path / "older")
        tensors = load_file(older / "model.safetensors")
        renamed = {_renamed(name, layout): tensor for name, tensor in tensors.items()}
        save_file(renamed, older / "model.safetensors", metadata={"format": "pt"})
        state = load_model(get_mm_mapping(AutoConfig.from_pretrained(older)), older, FP32)
        for name, tensor in state.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name

    def test_features_of_videos_are_those_of_transformers(
        self, mapping: MMUtils, model: Any, reference: Reference
    ):
        videos = [video(6, 80, 64), video(3, 64, 120)]
        prompt = f"{qwen_vl.VIDEO} and {qwen_vl.VIDEO}"
        inputs = reference.inputs(prompt, [], videos)
        features = mapping.compute_features(model, self.mm_kwargs(mapping.hf_config, inputs))
        assert len(features) == 2
        assert_close(torch.cat(features), reference.video_features(prompt, videos), 1e-4)

    def test_each_depth_is_that_of_transformers(
        self, mapping: MMUtils, model: Any, reference: Reference
    ):
        images: list[Image.Image] = [picture(150, 90), picture(64, 200)]
        features = torch.cat(self.features(mapping, model, reference, images))
        expected = reference.features(self.prompt(reference, 2), images)
        width = mapping.text_config.hidden_size
        depths = zip(features.split(width, 1), expected.split(width, 1), strict=True)
        assert [assert_close(*depth, 1e-4) for depth in depths] == [None] * (
            1 + mapping.feature_levels
        )

    def test_the_layout_of_a_video_has_its_frames(
        self, mapping: MMUtils, model: Any, reference: Reference
    ):
        inputs = reference.inputs(qwen_vl.VIDEO, [], [video(6, 80, 64)])
        mm_kwargs = self.mm_kwargs(mapping.hf_config, inputs)
        (features,) = mapping.compute_features(model, mm_kwargs)
        item = {
            "pixel_values_videos": SimpleNamespace(data=mm_kwargs["pixel_values_videos"]),
            "video_grid_thw": SimpleNamespace(data=mm_kwargs["video_grid_thw"][0]),
        }
        layout = mapping.feature_layout(item)
        assert layout is not None
        assert layout.frames == 3  # two by two are encoded together
        assert layout.frames * layout.base.rows * layout.base.columns == len(features)
        assert layout.places().tolist() == list(range(len(features)))

    @pytest.mark.parametrize(
        ("named", "changes"),
        {
            "mrope_section": {"text_config.rope_parameters.mrope_section": [16, 16, 16]},
            "text_config.hidden_size": {"text_config.hidden_size": 512},
            "text_config.hidden_act 'relu'": {"text_config.hidden_act": "relu"},
            "vision_config.hidden_act 'relu'": {"vision_config.hidden_act": "relu"},
        }.items(),
    )
    def test_what_would_not_be_honoured_is_refused_by_name(
        self, config: Any, named: str, changes: dict[str, Any]
    ):
        owner = with_changes(config, {})
        for name, value in changes.items():
            part, _, key = name.partition(".rope_parameters.")
            if key:
                getattr(owner, part).rope_parameters[key] = value
            else:
                owner = with_changes(owner, {name: value})
        with pytest.raises(UnsupportedModelError, match=self.model_type) as error:
            get_mm_mapping(owner)
        assert named in str(error.value)

    def test_the_order_of_the_axes_is_the_generations(self, config: Any):
        """Transformers does not look at ``mrope_interleaved``."""
        interleaved = self.model_type == "qwen3_vl"
        owner = with_changes(config, {})
        rope = owner.text_config.rope_parameters
        rope["mrope_interleaved"] = not interleaved
        with pytest.raises(UnsupportedModelError, match=f"mrope_interleaved {not interleaved}"):
            get_mm_mapping(owner)
        for absent in (False, True):
            rope["mrope_interleaved"] = interleaved
            if absent:
                del rope["mrope_interleaved"]
            mapping = get_mm_mapping(owner)
            assert isinstance(mapping, QwenVL)
            mrope = mapping.composition(for_card=False).mrope
            assert mrope is not None
            assert mrope.interleaved == interleaved


def _renamed(name: str, layout: str) -> str:
    """A tensor's name in one of the two layouts."""
    name = name.removeprefix("model.").replace("language_model.", "", 1)
    if name.startswith("lm_head."):
        return name
    if layout == "visual":
        return name if name.startswith("visual.") else f"model.{name}"
    return f"model.{name}" if name.startswith("visual.") else f"model.language_model.{name}"


class TestQwen3VL(QwenSuite):
    mapping_class, model_type = Qwen3VL, "qwen3_vl"


class TestQwen25VL(QwenSuite):
    mapping_class, model_type = Qwen25VL, "qwen2_5_vl"


class TestQwen2VL(QwenSuite):
    mapping_class, model_type = Qwen2VL, "qwen2_vl"


def test_mixtures_of_experts_are_refused_by_name() -> None:
    from transformers import Qwen3VLMoeConfig

    with pytest.raises(UnsupportedModelError, match=r"qwen3_vl_moe.*experts"):
        get_mm_mapping(Qwen3VLMoeConfig())

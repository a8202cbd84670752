# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: SigLIP, tiles that are shrunk, pooled frames of videos, Qwen 2."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from tests import architectures, llava_onevision
from tests.multimodal.mm_mappings.llava_next_suite import LlavaNextSuite
from tests.multimodal.mm_mappings.suite import BF16, FP32, assert_close, picture
from tests.reference import Reference
from tests.videos import video
from vllm_spyre_mm.model_executor.loader import load_model
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.multimodal.mm_mappings import UnsupportedModelError, get_mm_mapping
from vllm_spyre_mm.multimodal.mm_mappings.llava_onevision import LlavaOnevision, shrunk

FRAME_SIDE = 3
"""Half of the five patches on the side of a tile, and the rest."""


def video_kwargs(reference: Reference, *num_frames: int) -> dict[str, Any]:
    """What vLLM's processor makes of videos, each processed alone."""
    pixels = [
        reference.inputs(llava_onevision.VIDEO, [], [video(count, 80, 64)])["pixel_values_videos"]
        for count in num_frames
    ]
    each = [one[0] for one in pixels]
    return {"pixel_values_videos": torch.stack(each) if len(set(num_frames)) == 1 else each}


class TestLlavaOnevision(LlavaNextSuite):
    mapping_class = LlavaOnevision

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        text = architectures.qwen2(num_attention_heads=1, num_key_value_heads=1)
        path = tmp_path_factory.mktemp("llava_onevision")
        return architectures.save_checkpoint(path, llava_onevision.llava_onevision(text))

    @pytest.fixture
    def other(self) -> Any:
        return architectures.llava_next(architectures.llama())

    def test_large_grids_are_shrunk_and_others_are_not(
        self, mapping: LlavaOnevision, model: Any, reference: Reference
    ):
        """To about as many features as nine tiles have."""
        side = mapping.tile_side
        sizes = {
            (192, 192): (15, 15),
            (144, 144): (15, 15),
            (192, 144): (12, 17),
            (96, 48): (5, 10),
        }
        for size, fine in sizes.items():
            layout = mapping.layout_of(*size)
            assert (layout.fine.rows, layout.fine.columns) == fine, size
            assert layout.num_features == side**2 + fine[0] * (fine[1] + 1)
            (features,) = self.features(mapping, model, reference, [picture(*size)])
            assert len(features) == layout.num_features
            newlines = features[layout.newlines()]
            assert torch.equal(newlines, model.image_newline.expand_as(newlines))

    # -- videos ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("num_frames", [1, 2, 3, 8])
    def test_features_of_a_video_are_those_of_transformers(
        self,
        mapping: LlavaOnevision,
        model: Any,
        reference: Reference,
        num_frames: int,
    ):
        (features,) = mapping.compute_features(model, video_kwargs(reference, num_frames))
        videos = [video(num_frames, 80, 64)]
        assert features.dtype == torch.float32
        assert_close(features, reference.video_features(llava_onevision.VIDEO, videos), 1e-4)

    def test_videos_encoded_together_are_those_encoded_alone(
        self, mapping: LlavaOnevision, model: Any, reference: Reference
    ):
        for counts in ((2, 5), (3, 3)):
            together = mapping.compute_features(model, video_kwargs(reference, *counts))
            for features, count in zip(together, counts, strict=True):
                (alone,) = mapping.compute_features(model, video_kwargs(reference, count))
                assert_close(features, alone, 1e-5)

    @pytest.mark.parametrize("num_frames", [1, 2, 5])
    def test_the_layout_of_a_video_has_its_frames_and_a_newline(
        self, mapping: LlavaOnevision, model: Any, reference: Reference, num_frames: int
    ):
        given = video_kwargs(reference, num_frames)
        (features,) = mapping.compute_features(model, given)
        item = {"pixel_values_videos": SimpleNamespace(data=given["pixel_values_videos"][0])}
        layout = mapping.feature_layout(item)
        assert layout is not None
        assert layout.num_features == len(features) == num_frames * FRAME_SIDE**2 + 1
        assert layout.base_places().shape == (num_frames, FRAME_SIDE, FRAME_SIDE)
        assert layout.places().tolist() == list(range(len(features) - 1))
        assert layout.newlines() == [len(features) - 1]
        assert torch.equal(features[-1], model.image_newline)

    def test_a_frame_changes_its_own_features_alone(
        self, mapping: LlavaOnevision, model: Any, reference: Reference
    ):
        given = video_kwargs(reference, 3)
        (before,) = mapping.compute_features(model, given)
        changed = given["pixel_values_videos"].clone()
        changed[0, 1] += 1
        (after,) = mapping.compute_features(model, {"pixel_values_videos": changed})
        differs = (after - before).abs().amax(dim=1) > 1e-4 * before.abs().max()
        start = FRAME_SIDE**2
        assert differs.nonzero()[:, 0].tolist() == list(range(start, 2 * start))

    def test_frames_are_encoded_a_few_at_a_time_and_never_one_alone(
        self,
        mapping: LlavaOnevision,
        model: Any,
        reference: Reference,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """One tile would need a graph that the warmup does not make."""
        name = "vllm_spyre_mm.multimodal.mm_mappings.vision_language.PATCHES_AT_ONCE"
        monkeypatch.setattr(name, 3 * mapping.tile_side**2)
        seen, select = [], type(model).select_hidden_states

        def counting(self: Any, pixels: torch.Tensor) -> Pieces[torch.Tensor]:
            seen.append(len(pixels))
            return select(self, pixels)

        monkeypatch.setattr(type(model), "select_hidden_states", counting)
        for count in (1, 2, 4, 7):
            seen.clear()
            mapping.compute_features(model, video_kwargs(reference, count))
            assert sum(seen) == max(2, count)
            assert set(seen) <= {2, 3}

    def test_a_video_in_bf16_is_as_near_to_the_reference_as_that_of_transformers(
        self, mapping: LlavaOnevision, checkpoint: Path, reference: Reference
    ):
        model = load_model(mapping, checkpoint, BF16)
        given = video_kwargs(reference, 4)["pixel_values_videos"].bfloat16()
        (features,) = mapping.compute_features(model, {"pixel_values_videos": given})
        assert features.dtype == torch.bfloat16
        videos = [video(4, 80, 64)]
        expected = reference.video_features(llava_onevision.VIDEO, videos)
        in_bf16 = Reference(checkpoint, torch.bfloat16)
        theirs = in_bf16.video_features(llava_onevision.VIDEO, videos)
        off, ours = (
            float((rows.float() - expected).norm() / expected.norm()) for rows in (theirs, features)
        )
        assert ours <= max(1e-2, 1.5 * off)

    def test_each_modality_has_its_token(self, mapping: LlavaOnevision):
        ids = {"image": llava_onevision.IMAGE_TOKEN_ID, "video": llava_onevision.VIDEO_TOKEN_ID}
        assert mapping.feature_token_ids == ids


def test_published_sizes_are_shrunk_as_transformers_shrinks_them() -> None:
    """27 patches on a side: 36 tiles become nine, 11 too, 10 stay."""
    assert shrunk(6 * 27, 6 * 27, 27) == (81, 81)
    assert shrunk(2 * 27, 6 * 27, 27) == (46, 140)
    assert shrunk(2 * 27, 5 * 27, 27) == (54, 135)
    assert shrunk(0, 162, 27) == (0, 162)


VARIANTS: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "several layers": (architectures.qwen2(), {"vision_feature_layer": [-3, 1, -1]}),
    "a layer counted from the front": (architectures.qwen2(), {"vision_feature_layer": 2}),
    "no biases in the projector": (architectures.qwen2(), {"multimodal_projector_bias": False}),
    "an even number of patches": (
        architectures.qwen2(),
        {
            "vision_config.image_size": 54,
            "image_grid_pinpoints": [[54, 54], [54, 108], [162, 216]],
        },
    ),
    "CLIP": (
        architectures.qwen2(),
        {
            "vision_config": architectures.clip(image_size=llava_onevision.SIDE),
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -2,
        },
    ),
    "a tied head": (architectures.qwen2(tie_word_embeddings=True), {}),
    "Llama": (architectures.llama(), {}),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_what_a_configuration_may_vary_is_honoured(tmp_path: Path, variant: str) -> None:
    text, changes = VARIANTS[variant]
    config = llava_onevision.llava_onevision(text, **changes)
    checkpoint = architectures.save_checkpoint(tmp_path, config)
    mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
    model, reference = load_model(mapping, checkpoint, FP32), Reference(checkpoint)
    suite, images = TestLlavaOnevision(), [picture(230, 170), picture(30, 70)]
    features = torch.cat(suite.features(mapping, model, reference, images))
    assert_close(features, reference.features(suite.prompt(reference, 2), images), 1e-4)
    assert_close(*suite.logits(mapping, model, reference, images), 1e-4)
    (features,) = mapping.compute_features(model, video_kwargs(reference, 3))
    videos = [video(3, 80, 64)]
    assert_close(features, reference.video_features(llava_onevision.VIDEO, videos), 1e-4)


REFUSED: dict[str, dict[str, Any]] = {
    "vision_aspect_ratio 'anyres_max_4'": {"vision_aspect_ratio": "anyres_max_4"},
    "spatial_pool_stride 3": {"spatial_pool_stride": 3},
    "vision_feature_select_strategy is 'default'": {"vision_feature_select_strategy": "default"},
    "vision_feature_select_strategy is 'full'": {"vision_config": architectures.clip()},
    "text_config.sliding_window 64": {
        "text_config": architectures.qwen2(
            use_sliding_window=True, sliding_window=64, max_window_layers=0
        )
    },
}


@pytest.mark.parametrize("named", list(REFUSED))
def test_what_would_not_be_honoured_is_refused_by_name(named: str) -> None:
    config = llava_onevision.llava_onevision(architectures.qwen2(), **REFUSED[named])
    with pytest.raises(UnsupportedModelError, match="model type 'llava_onevision'") as error:
        get_mm_mapping(config)
    assert named in str(error.value)

# SPDX-License-Identifier: Apache-2.0
"""Images, videos and embeddings of one prompt, through vLLM's processors of the Qwen-VL family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY

from tests import qwen_vl
from tests.videos import video
from vllm_spyre_mm.frontend.image_processor import feature_width
from vllm_spyre_mm.frontend.processor_registration import register_image_processor

PICTURE = Image.new("RGB", (90, 70), "red")
SHORT = video(5, 100, 80)
IMAGE, VIDEO = qwen_vl.IMAGE, qwen_vl.VIDEO


@pytest.fixture(scope="module", params=qwen_vl.MODEL_TYPES)
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = tmp_path_factory.mktemp(request.param)
    config = getattr(qwen_vl, request.param)()
    name = config.model_type.replace("qwen", "Qwen").replace("_vl", "VL")
    config.architectures = [f"{name}ForConditionalGeneration"]
    if config.model_type == "qwen2_5_vl":
        config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(path)
    qwen_vl.save_qwen_processor(path, config)
    model_config = ModelConfig(
        str(path), dtype="float32", max_model_len=2048, enable_mm_embeds=True,
        limit_mm_per_prompt={"image": 3, "video": 2},
    )  # fmt: skip
    register_image_processor(model_config)
    return MULTIMODAL_REGISTRY.create_processor(model_config)


def process(processor: Any, text: str, **items: Any) -> Any:
    parsed = processor.info.parse_mm_data(items)
    return processor(processor.info.get_tokenizer().encode(text), parsed)


def image_features(processor: Any, count: int = 6, grid: Any = (1, 4, 6)) -> dict[str, Any]:
    rows = torch.ones(count, feature_width(processor.info))
    return {"image_embeds": rows, "image_grid_thw": torch.tensor(grid)}


def video_features(processor: Any) -> dict[str, Any]:
    rows = torch.ones(12, feature_width(processor.info))
    features: dict[str, Any] = {"video_embeds": rows, "video_grid_thw": torch.tensor([2, 4, 6])}
    if "timestamps" in processor.info.data_parser.embedding_fields["video"]:
        features["timestamps"] = [0.25, 1.25]
    return features


def fields(made: Any, modality: str) -> list[list[str]]:
    return [sorted(item) for item in made["mm_kwargs"][modality]]


def test_the_features_have_the_width_of_their_levels(processor: Any) -> None:
    config = processor.info.get_hf_config()
    levels = {"qwen3_vl": 3}.get(config.model_type, 0)
    assert feature_width(processor.info) == config.text_config.hidden_size * (1 + levels)


def test_pictures_videos_and_embeddings_of_both_keep_their_order(processor: Any) -> None:
    given, film = image_features(processor), video_features(processor)
    made = process(
        processor,
        f"a{VIDEO}b{IMAGE}c{IMAGE}d{VIDEO}e{IMAGE}",
        image=[given, PICTURE, given],
        video=[SHORT.item, film],
    )
    images, videos = (made["mm_placeholders"][name] for name in ("image", "video"))
    assert [place.get_num_embeds() for place in images] == [6, 24, 6]
    assert [place.get_num_embeds() for place in videos] == [90, 12]
    offsets = [place.offset for place in (videos[0], *images[:2], videos[1], images[2])]
    assert offsets == sorted(offsets)
    assert ["image_embeds" in item for item in fields(made, "image")] == [True, False, True]
    assert ["video_embeds" in item for item in fields(made, "video")] == [False, True]
    for place, item in zip(images, made["mm_kwargs"]["image"], strict=True):
        assert item["image_grid_thw"].data.prod() == 4 * place.get_num_embeds()
    assert len(set(made["mm_hashes"]["image"] + made["mm_hashes"]["video"])) == 4


def test_embeddings_of_images_beside_a_video(processor: Any) -> None:
    """Neither is mixed, and vLLM would take the embeddings' tags for pictures' that are missing."""
    both = image_features(processor, 30, [[1, 4, 6], [1, 8, 12]])
    made = process(processor, f"{IMAGE}{VIDEO}{IMAGE}", image=both, video=SHORT.item)
    assert [place.length for place in made["mm_placeholders"]["image"]] == [6, 24]
    assert [place.get_num_embeds() for place in made["mm_placeholders"]["video"]] == [90]


def test_a_video_that_is_given_back_stands_where_it_stood(processor: Any) -> None:
    """With the same tokens around and among its features."""
    made = process(processor, f"a{VIDEO}b", video=SHORT.item)
    (item,) = made["mm_kwargs"]["video"]
    rows = torch.ones(90, feature_width(processor.info))
    given = {"video_embeds": rows, "video_grid_thw": item["video_grid_thw"].data}
    for name in ("timestamps", "second_per_grid_ts"):
        if name in item:
            seconds = item[name].data
            given[name] = seconds if name == "timestamps" else [seconds]
    back = process(processor, f"a{VIDEO}b", video=given)
    assert back["prompt_token_ids"] == made["prompt_token_ids"]
    (kept,) = back["mm_kwargs"]["video"]
    assert kept.keys() - {"video_embeds"} == item.keys() - {"pixel_values_videos"}
    for name in kept.keys() - {"video_embeds"}:
        assert list(kept[name].data) == list(item[name].data) if name == "timestamps" else True


def test_a_placeholder_of_a_video_may_begin_with_text(processor: Any) -> None:
    (place,) = process(processor, f"a{VIDEO}b", video=SHORT.item)["mm_placeholders"]["video"]
    told_times = processor.info.get_hf_config().model_type == "qwen3_vl"
    assert (place.is_embed is not None) == told_times
    assert place.length > 90 if told_times else place.length == 90


@pytest.mark.parametrize(
    ("items", "fault"),
    [
        ({"image": torch.ones(1, 6, 256)}, "image embedding 0 .* needs the fields image_embeds"),
        ({"image": torch.ones(6, 256)}, "image embedding 0 .* needs the fields image_embeds"),
        ({"video": [torch.ones(6, 256)]}, "video embedding 0 .* needs the fields"),
        ({"image": [PICTURE, {"image_embeds": torch.ones(6, 256)}]}, "image embedding 1 .* lacks"),
        ({"image": [PICTURE] * 4}, "At most 3 image"),
        ({"video": [SHORT.item] * 3}, "At most 2 video"),
        ({"video": "file.mp4"}, "video 0 of the prompt is of type str"),
    ],
    ids=["tensors", "tensor", "video", "mixed", "images", "videos", "path"],
)
def test_what_cannot_be_used_is_refused_by_name(
    processor: Any, items: dict[str, Any], fault: str
) -> None:
    with pytest.raises(VLLMValidationError, match=fault):
        process(processor, "", **items)


def test_a_video_longer_than_a_prompt_is_refused_with_what_makes_it_shorter(processor: Any) -> None:
    long = video(400, 64, 64)
    with pytest.raises(VLLMValidationError, match="and max_model_len is 2048: choose") as error:
        process(processor, VIDEO, video=long.item)
    assert error.value.parameter == "video"


def test_what_transformers_refuses_is_said(processor: Any) -> None:
    """vLLM prints the pixels, and leaves the reason to the log."""
    with pytest.raises(VLLMValidationError, match="ratio must be smaller than 200") as error:
        process(processor, IMAGE, image=Image.new("RGB", (4000, 3)))
    assert "PIL" not in str(error.value)


@pytest.mark.parametrize("modality", ["image", "video"])
def test_embeddings_need_the_flag(
    processor: Any, modality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor.info.ctx.get_mm_config(), "enable_mm_embeds", False)
    given = {"image": image_features, "video": video_features}[modality](processor)
    media = {"image": PICTURE, "video": SHORT.item}[modality]
    sentence = rf"an item of the prompt \({modality}\) is given as an embedding: start the engine"
    for items in (given, [given], [media, given]):
        with pytest.raises(VLLMValidationError, match=sentence):
            process(processor, "", **{modality: items})


def test_least_and_most_pixels_are_a_requests_own(processor: Any) -> None:
    """Of an image and of each pair of frames; a video's bounds are those of all its frames."""
    square = 16 * 16  # pixels of a feature
    token_ids = processor.info.get_tokenizer().encode(f"{IMAGE}{VIDEO}")
    items = processor.info.parse_mm_data({"image": [PICTURE], "video": [SHORT.item]})
    counts = []
    for most in (16, 64):
        bounds = {"min_pixels": 4 * square, "max_pixels": most * square}
        made = processor(token_ids, items, hf_processor_mm_kwargs=bounds)
        ((picture,), (film,)) = (made["mm_placeholders"][name] for name in ("image", "video"))
        counts.append((picture.get_num_embeds(), film.get_num_embeds()))
    assert all(fewer < more for fewer, more in zip(*counts, strict=True))
    assert counts[0][0] <= 16


def test_the_largest_items_are_processed_though_they_exceed_a_prompt(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM does so at every start, to have its processor warm."""
    monkeypatch.setattr(processor.info.ctx.model_config, "max_model_len", 64)
    made = processor.get_dummy_mm_inputs({"image": 1, "video": 1})
    assert made["mm_placeholders"]["video"][0].length > 64

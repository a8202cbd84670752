# SPDX-License-Identifier: Apache-2.0
"""Chats of the Qwen-VL family: videos as files, and features with their grids, through vLLM."""

import asyncio
import base64
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.renderers import ChatParams, renderer_from_config

from tests import qwen_vl
from tests.video_files import gif, mp4, still
from tests.videos import video
from vllm_spyre_mm.frontend.image_processor import feature_width
from vllm_spyre_mm.frontend.renderer import ImageRenderer

SHORT = video(6, 96, 64)
TEXT = {"type": "text", "text": "hello"}
CLASSES = {"qwen3_vl": "Qwen3VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen2_vl": "Qwen2VL"}


@pytest.fixture(scope="module", params=qwen_vl.MODEL_TYPES)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    path: Path = tmp_path_factory.mktemp(request.param)
    config = getattr(qwen_vl, request.param)()
    config.architectures = [f"{CLASSES[config.model_type]}ForConditionalGeneration"]
    config.save_pretrained(path)
    qwen_vl.save_qwen_processor(path, config)
    limits = {"image": 3, "video": 2}
    arguments = EngineArgs(model=str(path), enable_mm_embeds=True, limit_mm_per_prompt=limits)
    return arguments.create_engine_config()


@pytest.fixture(scope="module")
def renderer(config: VllmConfig) -> Iterator[ImageRenderer]:
    made = renderer_from_config(config)
    yield made
    made.shutdown()


@pytest.fixture(params=[False, True], ids=["LLM", "server"])
def render(request: pytest.FixtureRequest, renderer: ImageRenderer) -> Any:
    """Makes the prompt of one message's parts."""

    def render(*parts: Any, **params: Any) -> Any:
        chats = [[{"role": "user", "content": [*parts, TEXT]}]]
        chat_params = ChatParams(**params)
        if request.param:
            _, (prompt,) = asyncio.run(renderer.render_chat_async(chats, chat_params))
        else:
            _, (prompt,) = renderer.render_chat(chats, chat_params)
        return prompt

    return render


def url(data: bytes, kind: str) -> dict[str, Any]:
    text = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    name = kind.partition("/")[0]
    return {"type": f"{name}_url", f"{name}_url": {"url": text}}


def film(data: bytes | None = None) -> dict[str, Any]:
    return url(mp4(SHORT) if data is None else data, "video/mp4")


def picture() -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (90, 70)).save(file, "PNG")
    return url(file.getvalue(), "image/png")


def saved(value: Any) -> str:
    file = io.BytesIO()
    torch.save(value, file)
    return base64.b64encode(file.getvalue()).decode()


def features(renderer: ImageRenderer, modality: str, *grid: int, **more: Any) -> dict[str, Any]:
    """A content part with features of a grid, all of whose numbers are base64 but the seconds'."""
    info = renderer.get_mm_processor().info
    rows = torch.ones(math.prod(grid) // 4, feature_width(info))
    given: dict[str, Any] = {
        f"{modality}_embeds": saved(rows),
        f"{modality}_grid_thw": saved(torch.tensor(grid)),
    }
    if "timestamps" in info.data_parser.embedding_fields[modality]:
        given["timestamps"] = [float(second) for second in range(grid[0])]
    return {"type": f"{modality}_embeds", f"{modality}_embeds": given | more}


def counts(prompt: Any, modality: str) -> list[int]:
    return [place.get_num_embeds() for place in prompt["mm_placeholders"][modality]]


def test_a_file_and_a_picture(render: Any) -> None:
    prompt = render(film(), picture(), film(gif(SHORT)))
    assert counts(prompt, "image") == [24]
    first, second = counts(prompt, "video")
    assert first == second > 0
    assert len(set(prompt["mm_hashes"]["video"])) == 2


def test_a_request_chooses_its_frames(render: Any) -> None:
    """With other frames it is another video in every cache."""
    few, many = (
        render(film(mp4(video(24, 96, 64))), media_io_kwargs={"video": {"fps": fps}})
        for fps in (1, 4)
    )
    assert counts(few, "video") < counts(many, "video")
    assert few["mm_hashes"] != many["mm_hashes"]


def test_a_file_that_is_no_video_is_refused_and_the_next_one_is_not(render: Any) -> None:
    for data in (b"", still(), mp4(SHORT)[:500]):
        with pytest.raises(ValueError, match=r"Failed to load a video|Could not open"):
            render(film(data))
    assert counts(render(film()), "video")


def test_features_with_their_grids(renderer: ImageRenderer, render: Any) -> None:
    images = features(renderer, "image", 1, 4, 6), features(renderer, "image", 1, 8, 4)
    assert counts(render(*images), "image") == [6, 8]
    videos = features(renderer, "video", 2, 4, 6), features(renderer, "video", 1, 4, 4)
    assert counts(render(*videos), "video") == [12, 4]


def test_everything_in_one_chat_keeps_its_order(renderer: ImageRenderer, render: Any) -> None:
    prompt = render(
        features(renderer, "video", 2, 4, 6),
        picture(),
        features(renderer, "image", 1, 4, 6, image_grid_thw=[1, 4, 6]),
        film(),
        picture(),
    )
    assert counts(prompt, "image") == [24, 6, 24]
    given, file = counts(prompt, "video")
    assert (given, file > 12) == (12, True)
    places = prompt["mm_placeholders"]
    order = [places["video"][0], *places["image"][:2], places["video"][1], places["image"][2]]
    offsets = [place.offset for place in order]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("modality", ["image", "video"])
def test_what_is_wrong_with_features_is_said(
    renderer: ImageRenderer, render: Any, modality: str
) -> None:
    """Also where vLLM would pad the narrow ones among wide ones."""
    rows, grid = f"{modality}_embeds", f"{modality}_grid_thw"
    good = features(renderer, modality, 1, 4, 6)
    narrow = features(renderer, modality, 1, 4, 6, **{rows: saved(torch.ones(6, 5))})
    with pytest.raises(VLLMValidationError, match=r"embedding 1 of .*its rows have 5 elements"):
        render(good, narrow)
    with pytest.raises(VLLMValidationError, match="has 6 rows, but its"):
        render(features(renderer, modality, 1, 4, 6, **{grid: [1, 4, 8]}))
    for value in ([[1, 2]], saved(torch.ones(1, 6, 5)), "AAAA", [1.5]):
        for field in (rows, grid):
            with pytest.raises((ValueError, VLLMValidationError), match="embedding"):
                render(features(renderer, modality, 1, 4, 6, **{field: value}))


@pytest.mark.parametrize("modality", ["image", "video"])
def test_features_without_a_grid_are_refused(
    renderer: ImageRenderer, render: Any, modality: str
) -> None:
    width = feature_width(renderer.get_mm_processor().info)
    alone = {"type": f"{modality}_embeds", f"{modality}_embeds": saved(torch.ones(6, width))}
    with pytest.raises(VLLMValidationError, match="needs the fields"):
        render(alone)


@pytest.mark.parametrize(
    "value",
    [torch.ones(1).expand(90_000), torch.ones(200_000), torch.ones(2, device="meta")],
    ids=["one number", "many", "none"],
)
def test_numbers_that_are_no_short_list_are_refused(
    renderer: ImageRenderer, render: Any, value: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="no short list of numbers"):
        render(features(renderer, "image", 1, 4, 6, image_grid_thw=saved(value)))


def test_where_no_media_are_allowed_features_are(
    config: VllmConfig, renderer: ImageRenderer
) -> None:
    """vLLM counts none of them, and loads them itself: with grids that are lists."""
    arguments = EngineArgs(
        model=config.model_config.model,
        enable_mm_embeds=True,
        limit_mm_per_prompt={"image": 0, "video": 0},
    )
    alone = renderer_from_config(arguments.create_engine_config())
    parts = [
        features(renderer, "image", 1, 4, 6, image_grid_thw=[1, 4, 6]),
        features(renderer, "video", 2, 4, 6, video_grid_thw=[2, 4, 6]),
    ]
    _, (prompt,) = alone.render_chat([[{"role": "user", "content": parts}]], ChatParams())
    assert (counts(prompt, "image"), counts(prompt, "video")) == ([6], [12])
    chat = [{"role": "user", "content": [film()]}]
    with pytest.raises(VLLMValidationError, match="At most 0 video"):
        alone.render_chat([chat], ChatParams())
    alone.shutdown()

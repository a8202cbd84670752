# SPDX-License-Identifier: Apache-2.0
"""Servers of Qwen3-VL and LLaVA-OneVision that are sent video files, and features of them back."""

import io
import json
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO

from tests import architectures, llava_onevision, qwen_vl
from tests.e2e.engines import relative_error
from tests.e2e.server_embeddings.requests import post
from tests.e2e.serving import png, running_server
from tests.multimodal.mm_mappings.suite import picture
from tests.reference import Reference
from tests.video_files import gif, mp4, still
from tests.videos import Video, video
from vllm_spyre_mm.payload import decode_mm_embedding

QUESTION = "What happens?"
MAX_TOKENS = 12
FILE = mp4(video(16, 96, 64, fps=8.0))
PICTURE = picture(130, 90)


@dataclass(frozen=True)
class Server:
    """A server, what asks it, and Transformers on its checkpoint."""

    address: str
    client: openai.OpenAI
    reference: Reference

    def ask(self, *parts: Any, **body: Any) -> Any:
        content = [*parts, {"type": "text", "text": QUESTION}]
        messages: list[Any] = [{"role": "user", "content": content}]
        (choice,) = self.client.chat.completions.create(
            model="demo",
            messages=messages,
            temperature=0,
            max_tokens=MAX_TOKENS,
            extra_body={"return_mm_embedding": True, "return_token_ids": True, **body},
        ).choices
        return choice

    def expected(self, *tags: str, images: Any = (), videos: Any = ()) -> list[int]:
        """Tokens of Transformers' answer."""
        return self.reference.generate(prompt(*tags), images, MAX_TOKENS, videos)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("video-server")
    checkpoint: Path = architectures.save_checkpoint(path / "model", qwen_vl.qwen3_vl())
    flags = (
        *("--enable-mm-embeds", "--trust-request-mm-kwargs"),
        *("--limit-mm-per-prompt", json.dumps({"image": 2, "video": 2})),
        *("--max-num-batched-tokens", "128"),
    )
    with (
        running_server(checkpoint, path / "log.txt", *flags) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield Server(address, client, Reference(checkpoint))


def prompt(*tags: str) -> str:
    """As the chat template writes it."""
    items = "".join(tags)
    return f"<|im_start|>user\n{items}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def part(data: bytes, kind: str = "video/mp4") -> dict[str, Any]:
    name = f"{kind.partition('/')[0]}_url"
    return {"type": name, name: {"url": f"data:{kind};base64,{b64encode(data).decode()}"}}


def sampled(data: bytes = FILE) -> Video:
    """The frames that the model's rule chooses of a file, at their times."""
    io = VideoMediaIO(ImageMediaIO(), video_backend="qwen3_vl")
    frames, metadata = io.load_bytes(data).media
    first, second, *_ = metadata["frames_indices"]
    assert [*range(first, 16, second - first)] == metadata["frames_indices"]
    return Video(frames, metadata["fps"] / (second - first))  # type: ignore[arg-type]


def saved(value: Any) -> str:
    file = io.BytesIO()
    torch.save(value, file)
    return b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("make", [mp4, gif])
def test_a_file_is_answered_as_transformers_answers_its_frames(server: Server, make: Any) -> None:
    data = make(video(16, 96, 64, fps=8.0 if make is mp4 else 10.0))
    expected = server.expected(qwen_vl.VIDEO, videos=[sampled(data)])
    choice = server.ask(part(data))
    assert choice.token_ids == expected
    features = server.reference.video_features(prompt(qwen_vl.VIDEO), [sampled(data)])
    embedding = decode_mm_embedding(choice.mm_embedding)
    assert relative_error(embedding, features) < 1e-4
    (item,) = choice.mm_embedding["items"]
    assert (item["modality"], item["start"], item["end"]) == ("video", 0, len(embedding))


def grid_of(server: Server, *tags: str, images: Any = (), videos: Any = ()) -> dict[str, Any]:
    inputs = server.reference.inputs(prompt(*tags), images, videos)
    return {name: grid.tolist() for name, grid in inputs.items() if name.endswith("_grid_thw")}


def test_features_take_the_place_of_what_they_were_made_of(server: Server) -> None:
    """One by one, beside pictures and videos, and all of them."""
    film = sampled()
    tags = (qwen_vl.IMAGE, qwen_vl.VIDEO, qwen_vl.IMAGE)
    expected = server.expected(*tags, images=[PICTURE, PICTURE], videos=[film])
    image, file = part(png(PICTURE), "image/png"), part(FILE)
    choice = server.ask(image, file, image)
    assert choice.token_ids == expected
    rows = decode_mm_embedding(choice.mm_embedding)
    first, middle, _ = (rows[item["start"] : item["end"]] for item in choice.mm_embedding["items"])
    grids = grid_of(server, *tags, images=[PICTURE, PICTURE], videos=[film])
    image_back = {
        "type": "image_embeds",
        "image_embeds": {
            "image_embeds": saved(first),
            "image_grid_thw": saved(torch.tensor(grids["image_grid_thw"][0])),
        },
    }
    video_back = {
        "type": "video_embeds",
        "video_embeds": {
            "video_embeds": saved(middle),
            "video_grid_thw": grids["video_grid_thw"][0],
            "timestamps": [0.3125, 1.5625],  # in the middle of each pair of frames
        },
    }
    for parts in (
        (image_back, file, image),
        (image, video_back, image),
        (image, video_back, image_back),
        (image_back, video_back, image_back),
    ):
        assert server.ask(*parts).token_ids == expected
    wrong = image_back["image_embeds"] | {"image_grid_thw": [1, 4, 4]}  # type: ignore[operator]
    with pytest.raises(openai.BadRequestError, match=r"image embedding 0 .*stands for 4"):
        server.ask({"type": "image_embeds", "image_embeds": wrong}, file)


def test_a_file_that_is_no_video_is_the_clients_error_and_the_next_one_works(
    server: Server,
) -> None:
    expected = server.expected(qwen_vl.VIDEO, videos=[sampled()])
    for data in (b"", b"no video", still(), FILE[: len(FILE) // 2]):
        with pytest.raises(openai.BadRequestError, match=r"a video|video stream"):
            server.ask(part(data))
        assert server.ask(part(FILE)).token_ids == expected


def test_limits_are_said(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match=r"At most 2 video\(s\)"):
        server.ask(*[part(FILE)] * 3)
    long = part(mp4(video(120, 128, 96, fps=8.0)))
    large = {"max_pixels": 120 * 128 * 96}
    every = {"media_io_kwargs": {"video": {"fps": 8}}, "mm_processor_kwargs": {"fps": 8.0}}
    with pytest.raises(openai.BadRequestError, match="max_model_len is 1024: choose fewer frames"):
        server.ask(long, **every | {"mm_processor_kwargs": {"fps": 8.0, **large}})
    for options in (every, {"mm_processor_kwargs": large}):
        assert decode_mm_embedding(server.ask(long, **options).mm_embedding).shape[1] == 1024


def test_embeddings_of_a_video_alone(server: Server) -> None:
    status, answer = post(server.address, {"input": [part(FILE)]})
    assert status == 200
    features = server.reference.video_features(prompt(qwen_vl.VIDEO), [sampled()])
    assert relative_error(decode_mm_embedding(answer["mm_embedding"]), features) < 1e-4


# -- LLaVA-OneVision ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("onevision-server")
    config = llava_onevision.llava_onevision(architectures.qwen2())
    checkpoint = architectures.save_checkpoint(path / "model", config)
    flags = (
        *("--enable-mm-embeds", "--trust-request-mm-kwargs"),
        *("--limit-mm-per-prompt", json.dumps({"image": 2, "video": 2})),
        *("--max-num-batched-tokens", "128"),
    )
    with (
        running_server(checkpoint, path / "log.txt", *flags) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield Server(address, client, Reference(checkpoint))


def chosen(data: bytes, count: int) -> Video:
    """As many frames of a file, evenly over the whole of it."""
    frames, metadata = VideoMediaIO(ImageMediaIO(), num_frames=count).load_bytes(data).media
    assert len(frames) == min(count, 16)
    return Video(frames, metadata["fps"])


@pytest.mark.parametrize("make", [mp4, gif])
@pytest.mark.parametrize("count", [None, 5])
def test_onevision_answers_a_file_as_transformers_answers_its_frames(
    onevision: Server, make: Any, count: int | None
) -> None:
    """All of 16 frames, or as many as the request chooses; beside a picture."""
    data = make(video(16, 96, 64, fps=8.0 if make is mp4 else 10.0))
    film, reference = chosen(data, count or 32), onevision.reference
    options = {"media_io_kwargs": {"video": {"num_frames": count}}} if count else {}
    choice = onevision.ask(part(png(PICTURE), "image/png"), part(data), **options)
    image, tag = llava_onevision.IMAGE, llava_onevision.VIDEO
    text = f"<|user|>\n{image}{tag}\n{QUESTION}\n"
    assert choice.token_ids == reference.generate(text, [PICTURE], MAX_TOKENS, [film])
    first, second = choice.mm_embedding["items"]
    assert (first["modality"], second["modality"]) == ("image", "video")
    embedding = decode_mm_embedding(choice.mm_embedding)
    assert (first["start"], first["end"], second["end"]) == (0, second["start"], len(embedding))
    features = reference.video_features(tag, [film])
    assert relative_error(embedding[second["start"] :], features) < 1e-4


def test_onevision_refuses_a_file_that_is_no_video_and_features_of_one(onevision: Server) -> None:
    expected = onevision.reference.generate(
        f"<|user|>\n{llava_onevision.VIDEO}\n{QUESTION}\n", [], MAX_TOKENS, [chosen(FILE, 32)]
    )
    features = {
        "type": "video_embeds",
        "video_embeds": {"video_embeds": saved(torch.ones(10, 128))},
    }
    for refused, why in (
        (part(b"no video"), "video stream"),
        (part(FILE[: len(FILE) // 2]), "video stream"),
        (features, "cannot lay out"),
    ):
        with pytest.raises(openai.BadRequestError, match=why):
            onevision.ask(refused)
        assert onevision.ask(part(FILE)).token_ids == expected


def test_onevision_gives_the_features_of_a_video_alone(onevision: Server) -> None:
    status, answer = post(onevision.address, {"input": [part(FILE)]})
    assert status == 200
    features = onevision.reference.video_features(llava_onevision.VIDEO, [chosen(FILE, 32)])
    assert relative_error(decode_mm_embedding(answer["mm_embedding"]), features) < 1e-4

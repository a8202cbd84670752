# SPDX-License-Identifier: Apache-2.0
"""A video is read whole, as far as its frames are asked for, or is the client's error."""

import asyncio
import base64
import io
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO

from tests.video_files import gif, mp4, still
from tests.videos import Video, video
from vllm_spyre_mm.vllm_fixes import media
from vllm_spyre_mm.vllm_fixes.media_connector import CheckedImageMediaIO, checked
from vllm_spyre_mm.vllm_fixes.video_media import CheckedVideoMediaIO

BACKENDS = ("qwen3_vl", "qwen2_vl", "opencv")
SHORT = video(12, 96, 64)


@pytest.fixture(autouse=True)
def installed() -> None:
    media.install()


def vllms(backend: str = "qwen3_vl", **options: Any) -> VideoMediaIO:
    return VideoMediaIO(ImageMediaIO(), video_backend=backend, **options)


def load(data: bytes, backend: str = "qwen3_vl", **options: Any) -> Any:
    return checked(vllms(backend, **options)).load_bytes(data)


# -- videos that pass ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [mp4, gif])
def test_a_good_video_is_what_vllm_makes_of_it(make: Callable[[Video], bytes], backend: str):
    data = make(SHORT)
    loaded, expected = load(data, backend, fps=2), vllms(backend, fps=2).load_bytes(data)
    frames, metadata = loaded.media
    assert np.array_equal(frames, expected.media[0])
    assert metadata == expected.media[1]
    assert loaded.original_bytes == data
    assert len(frames) == len(metadata["frames_indices"]) >= 2


def test_the_frames_are_those_of_the_file():
    frames, metadata = load(mp4(SHORT), fps=4).media
    assert frames.shape == SHORT.frames.shape
    assert metadata["fps"] == SHORT.fps
    assert np.abs(frames.astype(int) - SHORT.frames).mean() < 20  # its noise is compressed away
    steps = np.diff(frames.astype(float).mean(axis=(1, 2, 3)))
    assert (steps > 0).all(), "they become brighter"


@pytest.mark.parametrize("fps", [1, 2])
def test_options_of_the_reading_are_kept(fps: int):
    _, metadata = load(mp4(video(40, 64, 64, fps=10.0)), fps=fps, min_frames=2).media
    assert len(metadata["frames_indices"]) == 4 * fps


# -- videos that do not ----------------------------------------------------------------------------


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "data", [b"", b"no video at all", b"GIF89a", half(mp4(SHORT))], ids=["", "text", "gif", "half"]
)
def test_what_cannot_be_opened_is_refused(data: bytes, backend: str):
    with pytest.raises(ValueError, match="Could not open video stream"):
        load(data, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_picture_is_no_video(backend: str):
    with pytest.raises(ValueError, match="Failed to load a video: the file has no frames"):
        load(still(), backend)


def test_a_video_of_one_frame_is_refused_where_a_model_takes_two_together():
    one = mp4(video(1, 96, 64))
    with pytest.raises(ZeroDivisionError):
        vllms("qwen2_vl").load_bytes(one)
    with pytest.raises(ValueError, match=r"of 1 frame\(s\) at 4 a second none is chosen"):
        load(one, "qwen2_vl")


def with_broken_frames(monkeypatch: pytest.MonkeyPatch, broken: set[int]) -> None:
    """Make OpenCV fail at frames of :data:`SHORT`, whose reading begins with a look at its end."""
    whole = cv2.VideoCapture

    class Capture:
        def __init__(self, *args: Any) -> None:
            self._capture, self._grabbed = whole(*args), -2

        def __getattr__(self, name: str) -> Any:
            return getattr(self._capture, name)

        def grab(self) -> bool:
            self._grabbed += 1
            return self._capture.grab() and self._grabbed not in broken

    monkeypatch.setattr(cv2, "VideoCapture", Capture)


@pytest.mark.parametrize("broken", [{10, 11}, {0, 5}, {*range(12)}], ids=["end", "some", "all"])
def test_a_video_of_which_frames_are_missing_is_refused(
    broken: set[int], monkeypatch: pytest.MonkeyPatch
):
    """vLLM serves those that it could read."""
    data = mp4(SHORT)
    with_broken_frames(monkeypatch, broken)
    assert len(vllms(fps=4).load_bytes(data).media[0]) == 12 - len(broken)
    with pytest.raises(ValueError, match=f"{len(broken)} of the 12 frames that were chosen cannot"):
        load(data, fps=4)


def test_one_frame_may_be_missing(monkeypatch: pytest.MonkeyPatch):
    """As at the end of many files."""
    data = mp4(SHORT)
    with_broken_frames(monkeypatch, {11})
    assert load(data, fps=4).media[1]["frames_indices"] == [*range(11)]


@pytest.mark.parametrize("make", [mp4, gif])
def test_whatever_is_damaged_the_video_loads_or_is_the_clients_error(
    make: Callable[[Video], bytes],
):
    whole, rng, refused = make(SHORT), random.Random(0), 0
    for _ in range(60):
        file = bytearray(whole)
        for _ in range(rng.choice((1, 8, 64))):
            file[rng.randrange(len(file))] = rng.randrange(256)
        try:
            load(bytes(file[: rng.choice((len(file), rng.randrange(len(file))))]))
        except ValueError:
            refused += 1
    assert refused


@pytest.mark.parametrize("options", [{"fps": "many"}, {"max_frames": 0}, {"fps": None}], ids=str)
def test_options_that_make_no_sense_are_the_clients_error(options: dict[str, Any]):
    for backend in ("qwen2_vl", "qwen3_vl"):
        with pytest.raises(ValueError, match="Failed to load a video"):
            load(mp4(SHORT), backend, **options)


def test_frames_are_together_as_large_as_a_picture_may_be(monkeypatch: pytest.MonkeyPatch):
    data, pixels = mp4(SHORT), 12 * 96 * 64
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", str(pixels))
    assert len(load(data, fps=4).media[0]) == 12
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", str(pixels - 1))
    with pytest.raises(ValueError, match=rf"12 frames of 96x64 \({pixels} pixels\) exceeds"):
        load(data, fps=4)
    assert len(load(data, fps=2).media[0]) == 6
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "0")
    assert len(load(data, fps=4).media[0]) == 12


def test_a_sequence_of_pictures_is_held_to_that_before_one_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
):
    written = io.BytesIO()
    Image.fromarray(SHORT.frames[0]).save(written, "JPEG")
    data, pixels = ",".join([base64.b64encode(written.getvalue()).decode()] * 3), 3 * 96 * 64
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", str(pixels))
    assert len(checked(vllms()).load_base64("video/jpeg", data).media[0]) == 3
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", str(pixels - 1))
    monkeypatch.setattr(np, "stack", None)
    with pytest.raises(ValueError, match=rf"3 frames of 96x64 \({pixels} pixels\) exceeds"):
        checked(vllms()).load_base64("video/jpeg", data)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_header_that_claims_billions_of_frames(backend: str):
    loader = checked(vllms(backend)).video_loader
    source = SimpleNamespace(total_frames_num=2**31, original_fps=30.0, duration=2**31 / 30)
    with pytest.raises(ValueError, match="claims 2147483648 frames, more than 1000000"):
        loader.compute_frames_index_to_sample(source, SimpleNamespace(num_frames=4, fps=2))


def test_memory_is_no_fault_of_a_video(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(np, "empty", fail)
    with pytest.raises(MemoryError):
        load(mp4(SHORT))


# -- from a chat -----------------------------------------------------------------------------------


def data_url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def fetch(url: str, later: bool = False, **options: Any) -> Any:
    connector = MEDIA_CONNECTOR_REGISTRY.load("http", media_io_kwargs={"video": options})
    asked = {"video_processor": "Qwen3VLVideoProcessor"}
    if later:
        return asyncio.run(connector.fetch_video_async(url, **asked))
    return connector.fetch_video(url, **asked)


@pytest.mark.parametrize("later", [False, True], ids=["LLM", "server"])
def test_the_video_of_a_chat_is_checked(later: bool):
    frames, _ = fetch(data_url(mp4(SHORT)), later, fps=4).media
    assert len(frames) == 12
    with pytest.raises(ValueError, match="no frames"):
        fetch(data_url(still()), later)


@pytest.mark.parametrize("later", [False, True], ids=["LLM", "server"])
def test_a_url_that_cannot_be_used_is_the_clients_error(later: bool):
    with pytest.raises(VLLMUnprocessableEntityError, match="cannot be used") as error:
        fetch("data:video/mp4,plain", later)
    assert error.value.parameter == "video_url"
    with pytest.raises(VLLMUnprocessableEntityError, match="nothing not found"):
        fetch(data_url(mp4(SHORT)), later, video_backend="nothing")


def test_frames_may_be_sent_as_a_sequence_of_pictures():
    io: Any = checked(vllms(num_frames=-1))
    frames = [ImageMediaIO().encode_base64(image, image_format="JPEG") for image in SHORT.images]
    read, _ = fetch(f"data:video/jpeg;base64,{','.join(frames)}", num_frames=-1).media
    assert read.shape == SHORT.frames.shape
    assert isinstance(io.image_io, CheckedImageMediaIO)
    broken = [frames[0], frames[1][: len(frames[1]) // 2 // 4 * 4]]
    with pytest.raises(ValueError, match="Failed to load image"):
        fetch(f"data:video/jpeg;base64,{','.join(broken)}", num_frames=-1)


def test_a_video_is_checked_once():
    once = checked(vllms())
    assert isinstance(once, CheckedVideoMediaIO)
    assert checked(once) is once

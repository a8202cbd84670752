# SPDX-License-Identifier: Apache-2.0
"""A video of a prompt becomes frames and their times, or is refused with a sentence."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.base import MediaWithBytes

from tests.videos import video
from vllm_spyre_mm.frontend.videos import prepare_videos

SHORT = video(4, 30, 20, fps=2.0)
FRAMES = SHORT.frames


def prepare(videos: Any, *, needs_metadata: bool = False) -> Any:
    return prepare_videos(videos, needs_metadata=needs_metadata)


ONE_VIDEO = {
    "an array": FRAMES,
    "a tensor": torch.from_numpy(FRAMES),
    "wide integers": FRAMES.astype(np.int64),
    "channels first": np.ascontiguousarray(FRAMES.transpose(0, 3, 1, 2)),
    "a list of arrays": list(FRAMES),
    "a tuple of arrays": tuple(FRAMES),
    "a list of tensors": list(torch.from_numpy(FRAMES)),
    "pictures": SHORT.images,
}


@pytest.mark.parametrize("given", ONE_VIDEO.values(), ids=ONE_VIDEO)
def test_frames_are_given_in_many_ways(given: Any) -> None:
    (frames,) = prepare(given)
    assert frames.dtype == np.uint8
    assert np.array_equal(frames, FRAMES)
    for several in ([given], [given, given]):
        prepared = prepare(several)
        assert len(prepared) == len(several)
        assert all(np.array_equal(frames, FRAMES) for frames in prepared)
    ((frames, metadata),) = prepare((given, {"fps": 2}), needs_metadata=True)
    assert np.array_equal(frames, FRAMES)
    assert metadata["fps"] == 2.0


def test_an_array_of_one_more_axis_is_several() -> None:
    assert len(prepare(np.stack([FRAMES, FRAMES, FRAMES]))) == 3


def test_transparent_pictures_lie_on_white() -> None:
    ((frame,),) = prepare([[Image.new("RGBA", (5, 4), (0, 0, 0, 0))]])
    assert frame.min() == 255


def test_what_follows_from_the_frames_is_filled_in() -> None:
    ((_, metadata),) = prepare((FRAMES, {"fps": 2}))
    assert metadata == {**SHORT.metadata, "video_backend": "frames"}
    given = {"fps": 8.0, "total_num_frames": 20, "frames_indices": [0, 5, 5, 19]}
    ((_, metadata),) = prepare([(FRAMES, given)])
    assert metadata["frames_indices"] == [0, 5, 5, 19]
    assert metadata["duration"] == 2.5


def test_what_a_loader_says_is_kept() -> None:
    """Also of a chat's video, which is checked where it is loaded."""
    said = SHORT.metadata | {"do_sample_frames": True, "duration": 2.1}
    ((_, metadata),) = prepare((FRAMES, said), needs_metadata=True)
    assert metadata == said
    loaded = MediaWithBytes(SHORT.item, b"file")
    assert prepare([loaded, None], needs_metadata=True) == [loaded, None]


def test_embeddings_are_left_as_they_are() -> None:
    rows, several = torch.ones(3, 8), torch.ones(1, 3, 8)
    given = {"video_embeds": rows}
    assert prepare(several) is several
    assert prepare(given) is given
    assert prepare(None) is None
    prepared = prepare([rows, given, FRAMES])
    assert prepared[0] is rows
    assert prepared[1] is given


@pytest.mark.parametrize(
    ("frames", "fault"),
    [
        ("a.mp4", "is of type str: give its frames"),
        (FRAMES[0], r"is an array of shape \(20, 30, 3\): a video has frames"),
        (FRAMES[:0], r"is empty: an array of shape \(0, 20, 30, 3\)"),
        (FRAMES[..., :2], "neither the last nor the second axis has 3 channels"),
        (FRAMES / 255, "dtype float64: pixels are whole numbers from 0 to 255"),
        (FRAMES.astype(int) - 300, "whole numbers from 0 to 255"),
        (FRAMES.astype(int) + 200, "whole numbers from 0 to 255"),
        ([FRAMES[0], FRAMES[0][:9]], "has frames of different sizes"),
        (torch.empty(2, 4, 4, 3, device="meta"), "without storage"),
    ],
    ids=str,
)
def test_what_is_no_video_is_refused_by_its_place(frames: Any, fault: str) -> None:
    with pytest.raises(VLLMValidationError, match=f"video 1 of the prompt .*{fault}") as error:
        prepare([FRAMES, (frames, {"fps": 1.0})])
    assert error.value.parameter == "video"


@pytest.mark.parametrize(
    ("metadata", "fault"),
    [
        ({}, r"has a frame rate \(fps\) of None"),
        ({"fps": 0}, "has a frame rate"),
        ({"fps": float("inf")}, "has a frame rate"),
        ({"fps": "2"}, "has a frame rate"),
        ({"fps": 2, "speed": 1}, "has metadata that are not known: speed"),
        ({"fps": 2, "total_num_frames": 9}, "needs frames_indices with the index of each of its 4"),
        ({"fps": 2, "total_num_frames": 3}, "needs frames_indices"),
        ({"fps": 2, "frames_indices": [0, 1, 2]}, "needs frames_indices"),
        ({"fps": 2, "frames_indices": [0, 2, 1, 3]}, "needs frames_indices"),
        ({"fps": 2, "frames_indices": [0, 1, 2, 4]}, "needs frames_indices"),
        ({"fps": 2, "frames_indices": [0, 1.0, 2, 3]}, "needs frames_indices"),
        (5, "has metadata of type int"),
    ],
    ids=str,
)
def test_metadata_that_do_not_fit_the_frames_are_refused(metadata: Any, fault: str) -> None:
    with pytest.raises(VLLMValidationError, match=f"video 0 of the prompt {fault}"):
        prepare([(FRAMES, metadata)])


def test_a_model_that_is_told_times_needs_them() -> None:
    """No rate is made up."""
    with pytest.raises(VLLMValidationError, match="has no metadata: give"):
        prepare(FRAMES, needs_metadata=True)
    loaded = MediaWithBytes((FRAMES, SHORT.metadata | {"fps": 0.0}), b"file")
    with pytest.raises(VLLMValidationError, match="has a frame rate"):
        prepare([loaded], needs_metadata=True)
    assert prepare([loaded]) == [loaded]

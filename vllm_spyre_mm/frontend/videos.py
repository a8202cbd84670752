# SPDX-License-Identifier: Apache-2.0
"""Makes the videos of a prompt what vLLM's processors take, or refuses them with a sentence.

A video is its frames, and what is known of them: ``fps`` at least, the frames in a second of the
video. A model that is told the times of its frames needs that.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm.multimodal.image import convert_image_mode
from vllm.multimodal.media.base import MediaWithBytes

METADATA = (
    "fps",
    "duration",
    "total_num_frames",
    "frames_indices",
    "video_backend",
    "do_sample_frames",
)
"""What vLLM's loaders say of a video."""

MOST_RATE = 1e6
"""Frames in a second, and seconds for a frame: beyond it times are no numbers in fp32."""

HOW = 'give (frames, {"fps": …}) with the number of frames in a second'


def prepare_videos(videos: Any, *, needs_metadata: bool) -> Any:
    """The videos of a prompt, each as frames uint8 ``(num_frames, height, width, 3)``.

    Args:
        videos: what vLLM takes for ``multi_modal_data["video"]``: one video or several. Embeddings
            and videos that a chat names by their ``uuid`` alone (None) are left as they are.
        needs_metadata: whether the model is told the times of frames.

    Raises:
        VLLMValidationError: says which video cannot be used, and why.
    """
    if isinstance(videos, Mapping) or _is_embedding(videos) or videos is None:
        return videos
    return [
        _prepared(video, index, needs_metadata=needs_metadata)
        for index, video in enumerate([videos] if _is_one(videos) else videos)
    ]


def _is_embedding(video: object) -> bool:
    return isinstance(video, torch.Tensor) and video.ndim in (2, 3)


def _is_one(videos: Any) -> bool:
    """Whether what is given is one video."""
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        return videos.ndim != 5
    if isinstance(videos, tuple) and len(videos) == 2 and isinstance(videos[1], Mapping):
        return True
    if isinstance(videos, (list, tuple)):
        return bool(videos) and all(_is_frame(each) for each in videos)
    return True


def _is_frame(item: object) -> bool:
    array = isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 3
    return isinstance(item, Image.Image) or array


def _prepared(video: Any, index: int, *, needs_metadata: bool) -> Any:
    from vllm.exceptions import VLLMValidationError

    if video is None or isinstance(video, Mapping) or _is_embedding(video):
        return video
    try:
        if isinstance(video, MediaWithBytes):
            if needs_metadata:
                _check_rate(video.media[1].get("fps"))
            return video
        frames, metadata = video, None
        if isinstance(video, tuple) and len(video) == 2 and not _is_frame(video[1]):
            frames, metadata = video
        frames = _frames(frames)
        if metadata is None:
            if needs_metadata:
                raise ValueError(f"has no metadata: {HOW}")
            return frames
        return frames, _metadata(metadata, len(frames))
    except ValueError as error:
        raise VLLMValidationError(
            f"video {index} of the prompt {error}", parameter="video"
        ) from error


# -- frames ----------------------------------------------------------------------------------------


def _frames(given: Any) -> np.ndarray:
    """Frames uint8 ``(num_frames, height, width, 3)``.

    Raises:
        ValueError: goes on after the name of the video.
    """
    if isinstance(given, (list, tuple)) and given and all(_is_frame(each) for each in given):
        arrays = [_array(each) for each in given]
        if len({array.shape for array in arrays}) > 1:
            raise ValueError("has frames of different sizes")
        frames = np.stack(arrays)
    elif isinstance(given, (np.ndarray, torch.Tensor)):
        frames = _array(given)
    else:
        raise ValueError(
            f"is of type {type(given).__name__}: give its frames as pictures of Pillow's, or as an "
            "array of frames, height, width and 3 channels"
        )
    return _checked(frames)


def _array(given: Any) -> np.ndarray:
    if isinstance(given, Image.Image):
        return np.asarray(convert_image_mode(given, "RGB"))
    if isinstance(given, np.ndarray):
        return given
    if given.is_meta or given.is_quantized or given.layout != torch.strided:
        raise ValueError("is a tensor that is sparse, quantised or without storage")
    given = given.detach().cpu()
    return np.asarray((given.float() if given.is_floating_point() else given).numpy())


def _checked(frames: np.ndarray) -> np.ndarray:
    said = f"is an array of shape {frames.shape}"
    if frames.ndim != 4:
        raise ValueError(f"{said}: a video has frames, height, width and 3 channels")
    if 0 in frames.shape:
        raise ValueError(f"is empty: an array of shape {frames.shape}")
    if frames.shape[-1] != 3:
        frames = frames.transpose(0, 2, 3, 1)
    if frames.shape[-1] != 3:
        raise ValueError(f"{said}: neither the last nor the second axis has 3 channels")
    if frames.dtype == np.uint8:
        return frames
    if frames.dtype.kind not in "iu" or frames.min() < 0 or frames.max() > 255:
        raise ValueError(f"{said} and dtype {frames.dtype}: pixels are whole numbers from 0 to 255")
    return frames.astype(np.uint8)


# -- metadata --------------------------------------------------------------------------------------


def _metadata(given: Any, num_frames: int) -> dict[str, Any]:
    """Metadata as a loader gives them; what follows from the frames may be left out.

    Raises:
        ValueError: goes on after the name of the video.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"has metadata of type {type(given).__name__}: {HOW}")
    unknown = sorted(set(map(str, given)) - set(METADATA))
    if unknown:
        raise ValueError(f"has metadata that are not known: {', '.join(unknown)}")
    fps = _check_rate(given.get("fps"))
    total: Any = given.get("total_num_frames", num_frames)
    indices: Any = given.get("frames_indices")
    if indices is None and total == num_frames:
        indices = [*range(num_frames)]
    _check_indices(indices, num_frames, total)
    return {
        "fps": fps,
        "duration": total / fps,
        "total_num_frames": total,
        "frames_indices": [*map(int, indices)],
        "video_backend": "frames",
        "do_sample_frames": False,
        **{name: given[name] for name in given if name not in ("fps", "frames_indices")},
    }


def _check_rate(fps: Any) -> float:
    """The frames in a second; raises ValueError for a number that no film has."""
    number = isinstance(fps, (int, float)) and not isinstance(fps, bool)
    if not number or not 1 / MOST_RATE <= fps <= MOST_RATE:  # false for NaN
        raise ValueError(f"has a frame rate (fps) of {fps}: {HOW}")
    return float(fps)


def _check_indices(indices: Any, num_frames: int, total: Any) -> None:
    """Raise ValueError unless there is the index of each frame among all of the video's."""
    whole = isinstance(total, int) and isinstance(indices, (Sequence, np.ndarray))
    if not whole or len(indices) != num_frames or not _ascend(indices, total):
        raise ValueError(
            f"needs frames_indices with the index of each of its {num_frames} frames among "
            "total_num_frames, in order"
        )


def _ascend(indices: Any, total: int) -> bool:
    if not all(isinstance(index, (int, np.integer)) for index in indices):
        return False
    return indices[0] >= 0 and indices[-1] < total and all(np.diff(indices) >= 0)

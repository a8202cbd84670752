# SPDX-License-Identifier: Apache-2.0
"""Reads pictures and videos from files, as vLLM's server reads what it is sent."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

Video = tuple[np.ndarray, dict[str, Any]]
"""Frames, uint8 ``(num_frames, height, width, 3)``, and what vLLM's loaders say of their times."""

Item = Image.Image | Video


def read_item(path: Path, modalities: Collection[str], video_loader: str | None = None) -> Item:
    """A picture, or a video if the model takes some: then an animated GIF is one too.

    Args:
        path: of a file.
        modalities: that the model takes.
        video_loader: as for :func:`read_video`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither.
    """
    if "video" in modalities and not _is_still(path):
        return read_video(path, video_loader)
    return read_picture(path)


def read_picture(path: Path) -> Image.Image:
    """A picture from a file: RGB, turned as its EXIF says, bombs refused.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no picture.
    """
    from vllm.multimodal.media.image import ImageMediaIO

    return ImageMediaIO().load_file(path).media


def read_video(path: Path, video_loader: str | None = None) -> Video:
    """A video from a file, with the frames that a server takes of it by default.

    Args:
        path: of the file.
        video_loader: vLLM's name of what chooses and reads frames; None for vLLM's default.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no video, or not whole.
    """
    from vllm.multimodal.media.image import ImageMediaIO
    from vllm.multimodal.media.video import VideoMediaIO

    from vllm_spyre_mm.vllm_fixes.media_connector import checked

    video_io = checked(VideoMediaIO(ImageMediaIO(), video_backend=video_loader))
    frames, metadata = video_io.load_file(path).media
    assert isinstance(frames, np.ndarray), "decoded on the CPU"
    return frames, metadata


def _is_still(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return getattr(picture, "n_frames", 1) == 1 or picture.format != "GIF"
    except UnidentifiedImageError:
        return False

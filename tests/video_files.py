# SPDX-License-Identifier: Apache-2.0
"""Videos for the tests, as files of real formats."""

import tempfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from tests.videos import Video


def mp4(video: Video) -> bytes:
    """An MP4 file of MPEG-4 video; the frames are nearly those of ``video``."""
    height, width = video.frames.shape[1:3]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(path), codec, video.fps, (width, height))
        for frame in video.frames:
            writer.write(np.ascontiguousarray(frame[:, :, ::-1]))  # its channels are BGR
        writer.release()
        return path.read_bytes()


def gif(video: Video) -> bytes:
    """An animated GIF."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.gif"
        first, *others = (image.convert("P") for image in video.images)
        milliseconds = round(1000 / video.fps)
        first.save(path, save_all=True, append_images=others, duration=milliseconds)
        return path.read_bytes()


def still() -> bytes:
    """A picture, which is no video."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        Image.new("RGB", (40, 30)).save(path)
        return path.read_bytes()

# SPDX-License-Identifier: Apache-2.0
"""Reads a video whole, as far as its frames are asked for, or refuses it.

Leans on: ``VideoMediaIO`` decodes a file with its ``video_loader``, whose class chooses frames with
``compute_frames_index_to_sample`` and reads those with ``read_frames``, from a stream that is
OpenCV's; a sequence of pictures it decodes with its ``image_io``.
"""

import base64
import io
from typing import Any

import cv2
import numpy as np
from PIL import Image
from vllm import envs
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video import VideoLoader

from vllm_spyre_mm.vllm_fixes.media_errors import bytes_error

MOST_FRAMES = 1_000_000
"""Of a file: nine hours at 30 a second. A header may claim billions, and vLLM tries each one."""

TOLERATED = 1
"""Frames that may be missing: many files say that they have one more than they do."""


class CheckedVideoMediaIO(VideoMediaIO):
    """Refuses a video of which frames are missing, or too large a part is asked for.

    Args:
        media_io: vLLM's, with its options.
        image_io: decodes the frames of a sequence of pictures.
    """

    def __init__(self, media_io: VideoMediaIO, image_io: ImageMediaIO) -> None:
        super().__init__(image_io, media_io.num_frames, **media_io.kwargs)
        loader: Any = type(media_io.video_loader)
        self.video_loader = type(loader.__name__, (EveryFrame, loader), {})()

    def load_bytes(self, data: bytes) -> MediaWithBytes[Any]:
        """The frames of a video and its metadata, from the bytes of a file.

        Raises:
            ValueError: it cannot be decoded, or frames of it are missing or too many.
        """
        with bytes_error("a video"):
            return super().load_bytes(data)

    def load_base64(self, media_type: str, data: str) -> MediaWithBytes[Any]:
        """As :meth:`load_bytes`, or from a sequence of JPEG pictures."""
        with bytes_error("a video"):
            if media_type.lower() == "video/jpeg":
                self._check_pictures(data)
            return super().load_base64(media_type, data)

    def _check_pictures(self, data: str) -> None:
        """Raise ValueError for pictures that are too large together, before one is decoded.

        Args:
            data: base64 of each, commas between them.
        """
        limit = self.num_frames
        parts = data.split(",", limit)[:limit] if limit > 0 else data.split(",")
        sizes = [Image.open(io.BytesIO(base64.b64decode(part))).size for part in parts]
        check_size(len(sizes), *(max(extents) for extents in zip(*sizes, strict=True)))


class EveryFrame(VideoLoader):
    """Of a loader of videos: reads every frame that it chooses, or raises."""

    @classmethod
    def compute_frames_index_to_sample(cls, source: Any, target: Any, **options: Any) -> list[int]:
        """Indices of the frames to read.

        Raises:
            ValueError: there are none, or the file claims more than :data:`MOST_FRAMES`.
        """
        count = source.total_frames_num
        if count > MOST_FRAMES:
            raise ValueError(
                f"Failed to load a video: the file claims {count} frames, more than {MOST_FRAMES}"
            )
        if count < 1:
            raise ValueError("Failed to load a video: the file has no frames")
        try:
            chosen = super().compute_frames_index_to_sample(source, target, **options)
        except ZeroDivisionError:  # some divide by the number of frames that they choose
            chosen = []
        if not chosen:
            raise ValueError(
                f"Failed to load a video: of {count} frame(s) at {source.original_fps:.6g} a "
                "second none is chosen; show a picture as an image"
            )
        return chosen

    @classmethod
    def read_frames(
        cls, cap: Any, frame_idx: list[int], *args: Any, **kwargs: Any
    ) -> tuple[np.ndarray, list[int]]:
        """The frames, uint8 ``(num_frames, height, width, 3)``, and the index of each.

        Raises:
            ValueError: frames are missing, or they have more pixels than a picture may have.
        """
        count = len(set(frame_idx))
        size = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        check_size(count, *(int(cap.get(extent)) for extent in size))
        frames, read = super().read_frames(cap, frame_idx, *args, **kwargs)
        missing = count - len(read)
        if not read or missing > TOLERATED:
            raise ValueError(
                f"Failed to load a video: {missing} of the {count} frames that were chosen cannot "
                "be decoded"
            )
        return frames, read


def check_size(num_frames: int, width: int, height: int) -> None:
    """Raise ValueError for frames that are larger together than the operator allows a picture."""
    pixels, limit = num_frames * width * height, envs.VLLM_MAX_IMAGE_PIXELS
    if 0 < limit < pixels:
        raise ValueError(
            f"a video of {num_frames} frames of {width}x{height} ({pixels} pixels) exceeds the "
            f"limit of {limit} pixels, VLLM_MAX_IMAGE_PIXELS: choose fewer frames with "
            "media_io_kwargs, or send a smaller video"
        )

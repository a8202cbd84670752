# SPDX-License-Identifier: Apache-2.0
"""Videos for the tests, as frames in memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Video:
    """Frames that were sampled before, with the times they were taken at.

    Attributes:
        frames: uint8 ``(num_frames, height, width, 3)``.
        fps: frames in a second.
    """

    frames: np.ndarray
    fps: float = 4.0

    @property
    def metadata(self) -> dict[str, Any]:
        """What vLLM's loaders say of a video."""
        count = len(self.frames)
        return {
            "fps": self.fps,
            "duration": count / self.fps,
            "total_num_frames": count,
            "frames_indices": list(range(count)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }

    @property
    def item(self) -> tuple[np.ndarray, dict[str, Any]]:
        """The video as ``multi_modal_data`` takes it."""
        return self.frames, self.metadata

    @property
    def images(self) -> list[Image.Image]:
        """The frames as pictures."""
        return [Image.fromarray(frame) for frame in self.frames]


def video(num_frames: int, width: int, height: int, *, fps: float = 4.0) -> Video:
    """Noise on a gradient that moves, no frame like another."""
    generator = np.random.default_rng((num_frames, width, height))
    rows = np.linspace(0, 120, height)[None, :, None, None]
    columns = np.linspace(0, 60, width)[None, None, :, None]
    times = np.linspace(0, 40, num_frames)[:, None, None, None]
    noise = generator.uniform(0, 35, (num_frames, height, width, 3))
    return Video((rows + columns + times + noise).astype(np.uint8), fps)

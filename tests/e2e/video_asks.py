# SPDX-License-Identifier: Apache-2.0
"""Requests about pictures and videos, and what Transformers says to them."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image

from tests.reference import Reference
from tests.videos import Video


@dataclass(frozen=True)
class VideoAsk:
    """A request: its pictures and videos come before its question. A family of models subclasses.

    Attributes:
        image_tag: stands for a picture in the prompt.
        video_tag: stands for a video.
        template: of the prompt, with places for ``items``, the tags, and for ``question``.
    """

    image_tag: ClassVar[str]
    video_tag: ClassVar[str]
    template: ClassVar[str]

    question: str
    images: tuple[Image.Image, ...] = ()
    videos: tuple[Video, ...] = ()

    @property
    def text(self) -> str:
        """The prompt, with one tag for each picture and video."""
        items = self.image_tag * len(self.images) + self.video_tag * len(self.videos)
        return self.template.format(items=items, question=self.question)

    @staticmethod
    def given(video: Video) -> Any:
        """A video as the engine is given it."""
        return video.frames

    @property
    def prompt(self) -> dict[str, Any]:
        """The prompt as ``LLM.generate`` takes it."""
        data: dict[str, Any] = {}
        if self.images:
            data["image"] = list(self.images)
        if self.videos:
            data["video"] = [self.given(each) for each in self.videos]
        return {"prompt": self.text} | ({"multi_modal_data": data} if data else {})

    def expected(self, reference: Reference, max_tokens: int) -> list[int]:
        """The tokens of a greedy answer."""
        return reference.generate(self.text, self.images, max_tokens, self.videos)

    def features(self, reference: Reference) -> torch.Tensor | None:
        """The features of the pictures, then those of the videos; None without any."""
        parts = []
        if self.images:
            of_images = dataclasses.replace(self, videos=()).text
            parts.append(reference.features(of_images, self.images))
        if self.videos:
            of_videos = dataclasses.replace(self, images=()).text
            parts.append(reference.video_features(of_videos, self.videos))
        return torch.cat(parts) if parts else None

# SPDX-License-Identifier: Apache-2.0
"""vLLM's connector of media, whose every failure is the client's, and which stays where it may.

Leans on: ``MediaConnector`` loads every URL with ``load_from_url`` or ``load_from_url_async``, over
its ``connection``, every serialized embedding with ``fetch_image_embedding`` or
``fetch_video_embedding`` or their asynchronous forms, and makes what reads a video in
``fetch_video`` or ``fetch_video_async``, of a request's options. ``ImageMediaIO.load_bytes``
decodes every picture.
"""

import asyncio
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from vllm import envs
from vllm.connections import HTTPConnection, global_http_connection
from vllm.multimodal.image import normalize_image, open_image
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.media.connector import MediaConnector, global_thread_pool
from vllm.multimodal.media.image import ImageEmbeddingMediaIO, ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO

from vllm_spyre_mm.multimodal.feature_check import fault_of_serialized_embedding
from vllm_spyre_mm.vllm_fixes.media_errors import bytes_error, clients_error
from vllm_spyre_mm.vllm_fixes.video_media import CheckedVideoMediaIO


class CheckedMediaConnector(MediaConnector):
    """Loads media as vLLM does: pictures, videos and embeddings with classes that check them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.allowed_media_domains and self.connection is global_http_connection:
            self.connection = DirectConnection()

    def load_from_url(self, url: str, media_io: Any, **kwargs: Any) -> Any:
        """The media at a URL.

        Raises:
            ValueError: they cannot be used.
            VLLMUnprocessableEntityError: nor can the URL.
        """
        with clients_error(_parameter_of(media_io)):
            return super().load_from_url(url, checked(media_io), **kwargs)

    async def load_from_url_async(self, url: str, media_io: Any, **kwargs: Any) -> Any:
        """As :meth:`load_from_url`, in vLLM's threads."""
        with clients_error(_parameter_of(media_io)):
            return await super().load_from_url_async(url, checked(media_io), **kwargs)

    def fetch_video(self, video_url: str, **kwargs: Any) -> Any:
        """The frames of a video at a URL and what is known of them, or what is loaded already.

        Raises:
            ValueError: it cannot be used.
            VLLMUnprocessableEntityError: nor can the URL, or the options of its reading.
        """
        if isinstance(video_url, LoadedUrl):
            return video_url.loaded
        with clients_error("video_url"):
            return super().fetch_video(video_url, **kwargs)

    async def fetch_video_async(self, video_url: str, **kwargs: Any) -> Any:
        """As :meth:`fetch_video`, in vLLM's threads."""
        if isinstance(video_url, LoadedUrl):
            return video_url.loaded
        with clients_error("video_url"):
            return await super().fetch_video_async(video_url, **kwargs)

    def fetch_image_embedding(self, data: str) -> torch.Tensor:
        """An embedding ``(num_features, hidden_size)`` from its base64 text.

        Raises:
            ValueError: it is none.
        """
        return CheckedEmbeddingMediaIO().load_base64("", data)

    async def fetch_image_embedding_async(self, data: str) -> torch.Tensor:
        """As :meth:`fetch_image_embedding`, in vLLM's threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(global_thread_pool, self.fetch_image_embedding, data)

    def fetch_video_embedding(self, data: str) -> torch.Tensor:
        """As :meth:`fetch_image_embedding`, for a video."""
        return CheckedEmbeddingMediaIO("a video").load_base64("", data)

    async def fetch_video_embedding_async(self, data: str) -> torch.Tensor:
        """As :meth:`fetch_video_embedding`, in vLLM's threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(global_thread_pool, self.fetch_video_embedding, data)


class LoadedUrl(str):
    """A text in the place of the URL of a video that is loaded already.

    Attributes:
        loaded: what is there.
    """

    loaded: Any

    def __new__(cls, loaded: Any) -> "LoadedUrl":
        url = super().__new__(cls, "data:,loaded")
        url.loaded = loaded
        return url


class DirectConnection(HTTPConnection):
    """Follows no redirect, whatever it is told: vLLM checks a URL, not where that leads."""

    def get_response(self, url: str, **kwargs: Any) -> Any:
        return super().get_response(url, **kwargs | {"allow_redirects": False})

    async def get_async_response(self, url: str, **kwargs: Any) -> Any:
        return await super().get_async_response(url, **kwargs | {"allow_redirects": False})


class CheckedImageMediaIO(ImageMediaIO):
    """Decodes a picture before vLLM turns it as its EXIF says, which suppresses every error."""

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:  # type: ignore[override]
        """A picture from the bytes of a file.

        Raises:
            ValueError: it cannot be decoded whole, or is larger than ``VLLM_MAX_IMAGE_PIXELS``.
        """
        with bytes_error("image"):
            image: Image.Image = open_image(BytesIO(data))
            check_size(image)
            image.load()
            image = normalize_image(image)
            converted = self._convert_image_mode(image)
        if converted is image:
            return MediaWithBytes(converted, data)
        # The caches tell pictures apart by their bytes, and by what else made them what they are.
        mode = {
            "image_mode": self.image_mode,
            "rgba_background_color": self.rgba_background_color,
        }
        return MediaWithBytes(converted, data, mode)


class CheckedEmbeddingMediaIO(ImageEmbeddingMediaIO):
    """Refuses at once what is no embedding: one of rank 3 would be taken for pixels.

    Args:
        of: whose it is to be, in words.
    """

    def __init__(self, of: str = "an image") -> None:
        super().__init__()
        self.what = f"{of} embedding"

    def load_bytes(self, data: bytes) -> torch.Tensor:
        """An embedding as ``torch.save`` or ``numpy.save`` wrote it.

        Raises:
            ValueError: it is none.
        """
        try:
            with bytes_error(self.what):
                embedding = super().load_bytes(data)
        except MemoryError as error:  # an array may say that it has any shape
            raise ValueError(f"Failed to load {self.what}: it is too large to hold") from error
        fault = fault_of_serialized_embedding(embedding)
        if fault is not None:
            raise ValueError(f"Failed to load {self.what}: {fault}")
        return embedding


def checked(media_io: Any) -> Any:
    """What loads media, for pictures and videos one that checks them."""
    if type(media_io) is ImageMediaIO:
        return CheckedImageMediaIO(media_io.image_mode, **media_io.kwargs)
    if type(media_io) is VideoMediaIO:
        return CheckedVideoMediaIO(media_io, checked(media_io.image_io))
    return media_io


def _parameter_of(media_io: Any) -> str:
    """The field of a request that has the URL."""
    return "video_url" if isinstance(media_io, VideoMediaIO) else "image_url"


def check_size(image: Image.Image) -> None:
    """Raise ValueError for a picture that is larger than the operator allows, before it is decoded.

    (Pillow refuses what is enormous, whatever vLLM's limit is.)
    """
    width, height = image.size
    limit = envs.VLLM_MAX_IMAGE_PIXELS
    if 0 < limit < width * height:
        raise ValueError(
            f"an image of {width}x{height} ({width * height} pixels) exceeds the limit of {limit} "
            "pixels, VLLM_MAX_IMAGE_PIXELS"
        )

# SPDX-License-Identifier: Apache-2.0
"""vLLM's connector of media, whose every failure is the client's, and which stays where it may.

Leans on: ``MediaConnector`` loads every URL with ``load_from_url`` or ``load_from_url_async``, over
its ``connection``, and every serialized embedding with ``fetch_image_embedding`` or
``fetch_image_embedding_async``. ``ImageMediaIO.load_bytes`` decodes every picture. A ValueError is
answered with HTTP 400, a VLLMUnprocessableEntityError with 422.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from vllm import envs
from vllm.connections import HTTPConnection, global_http_connection
from vllm.exceptions import VLLMError, VLLMUnprocessableEntityError
from vllm.multimodal.image import normalize_image, open_image
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.media.connector import MediaConnector, global_thread_pool
from vllm.multimodal.media.image import ImageEmbeddingMediaIO, ImageMediaIO

from vllm_spyre_mm.multimodal.feature_check import fault_of_serialized_embedding


class CheckedMediaConnector(MediaConnector):
    """Loads media as vLLM does, pictures and embeddings with the classes below."""

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
        with clients_error():
            return super().load_from_url(url, checked(media_io), **kwargs)

    async def load_from_url_async(self, url: str, media_io: Any, **kwargs: Any) -> Any:
        """As :meth:`load_from_url`, in vLLM's threads."""
        with clients_error():
            return await super().load_from_url_async(url, checked(media_io), **kwargs)

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
    """Refuses at once what is no embedding of an image: one of rank 3 would be taken for pixels."""

    def load_bytes(self, data: bytes) -> torch.Tensor:
        """An embedding as ``torch.save`` or ``numpy.save`` wrote it.

        Raises:
            ValueError: it is none.
        """
        try:
            with bytes_error("an image embedding"):
                embedding = super().load_bytes(data)
        except MemoryError as error:  # an array may say that it has any shape
            raise ValueError("Failed to load an image embedding: it is too large") from error
        fault = fault_of_serialized_embedding(embedding)
        if fault is not None:
            raise ValueError(f"Failed to load an image embedding: {fault}")
        return embedding


def checked(media_io: Any) -> Any:
    """What loads media, for pictures one that checks them."""
    if type(media_io) is not ImageMediaIO:
        return media_io
    return CheckedImageMediaIO(media_io.image_mode, **media_io.kwargs)


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


@contextlib.contextmanager
def bytes_error(what: str) -> Iterator[None]:
    """Raises as ValueError what a decoder says of a client's bytes.

    Nothing else is worked on inside, and there is no end to what decoders raise for damaged bytes:
    RuntimeError, TypeError, AttributeError...
    """
    try:
        yield
    except (ValueError, VLLMError, MemoryError):
        raise  # a sentence already; what no picture is to blame for
    except Exception as error:
        raise ValueError(f"Failed to load {what}: {error}") from error


@contextlib.contextmanager
def clients_error() -> Iterator[None]:
    """Raises what went wrong with a URL as the client's error (HTTP 422), if it is not one yet."""
    try:
        yield
    except (ValueError, VLLMError, MemoryError):
        raise
    except Exception as error:
        raise VLLMUnprocessableEntityError(
            f"the media at this URL cannot be used: {error or type(error).__name__}",
            parameter="image_url",
        ) from error

# SPDX-License-Identifier: Apache-2.0
"""Makes media that cannot be used the client's error, not the server's, and not a black picture.

Leans on: ``ImageMediaIO.load_bytes`` decodes every picture that comes as bytes (over HTTP, from a
file), and the data parser takes every picture of Pillow's; both call ``normalize_image`` by the
name they imported, before they decode. ``ImageEmbeddingMediaIO.load_bytes`` reads every serialized
embedding; ``MediaConnector`` loads every URL with ``load_from_url`` or ``load_from_url_async``,
over its ``connection``. A ValueError is answered with HTTP 400; most of what these libraries raise
is none, and would be answered with HTTP 500 or 501 and a closed connection.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded


def install() -> None:
    """Extend vLLM's loaders of media as soon as they exist."""
    when_loaded("vllm.multimodal.media.image", _extend_image_loaders)
    when_loaded("vllm.multimodal.media.image", _decode_first)
    when_loaded("vllm.multimodal.parse", _decode_first)
    when_loaded("vllm.multimodal.media.connector", _extend_connector)


def _extend_image_loaders(module: ModuleType) -> None:
    require_attributes(module, ("ImageMediaIO", "ImageEmbeddingMediaIO"))
    pictures, embeddings = module.ImageMediaIO, module.ImageEmbeddingMediaIO
    require_parameters(pictures.load_bytes, ("data",))
    require_parameters(embeddings.load_bytes, ("data",))
    if not is_extended(pictures.load_bytes, __name__):
        pictures.load_bytes = _refusing("image", pictures.load_bytes)
    if not is_extended(embeddings.load_bytes, __name__):
        embeddings.load_bytes = _checking_embedding(
            _refusing("an image embedding", embeddings.load_bytes)
        )


def _refusing(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.exceptions import VLLMError

    @extending(original, __name__)
    def load_bytes(self: Any, data: bytes) -> Any:
        try:
            return original(self, data)
        except (ValueError, VLLMError, MemoryError):
            raise  # vLLM's own sentence; what no picture is to blame for
        except Exception as error:
            # Nothing but the client's bytes is worked on here, and there is no end to what
            # decoders raise for damaged ones: RuntimeError, TypeError, AttributeError...
            raise ValueError(f"Failed to load {what}: {error}") from error

    return load_bytes


def _checking_embedding(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses at once what is no embedding of an image: one of rank 3 would be taken for pixels."""
    from vllm_spyre_mm.multimodal.feature_check import fault_of_serialized_embedding

    @extending(original, __name__)
    def load_bytes(self: Any, data: bytes) -> Any:
        try:
            embedding = original(self, data)
        except MemoryError as error:  # an array may say that it has any shape
            raise ValueError("Failed to load an image embedding: it is too large") from error
        fault = fault_of_serialized_embedding(embedding)
        if fault is not None:
            raise ValueError(f"Failed to load an image embedding: {fault}")
        return embedding

    return load_bytes


def _decode_first(module: ModuleType) -> None:
    """Decodes a picture before vLLM turns it as its EXIF says.

    vLLM suppresses every error of the turning, which decodes first. Pillow does not decode a second
    time what it failed at: the rows that are missing, or all of them, would be served as black.
    """
    require_attributes(module, ("normalize_image",))
    original = module.normalize_image
    if is_extended(original, __name__):
        return
    require_parameters(original, ("image",))

    @extending(original, __name__)
    def normalize_image(image: Any) -> Any:
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"Failed to load image: {error}") from error
        return original(image)

    module.normalize_image = normalize_image  # type: ignore[attr-defined]


# -- URLs -----------------------------------------------------------------------------------------


def _extend_connector(module: ModuleType) -> None:
    require_attributes(module, ("MediaConnector", "HTTPConnection", "global_http_connection"))
    connector, connection = module.MediaConnector, module.HTTPConnection
    require_parameters(connector.__init__, ("connection", "allowed_media_domains"))
    for name in ("load_from_url", "load_from_url_async"):
        require_parameters(getattr(connector, name), ("url", "media_io"))
    for name in ("get_response", "get_async_response"):
        require_parameters(getattr(connection, name), ("url", "allow_redirects"))
    if not is_extended(connector.load_from_url, __name__):
        connector.load_from_url = _explaining(connector.load_from_url)
    if not is_extended(connector.load_from_url_async, __name__):
        connector.load_from_url_async = _explaining_later(connector.load_from_url_async)
    if not is_extended(connector.__init__, __name__):
        shared = module.global_http_connection
        connector.__init__ = _staying(connector.__init__, shared, _direct(connection)())


@contextlib.contextmanager
def _clients_error() -> Iterator[None]:
    """Raises what went wrong with a URL as the client's error (HTTP 422), if it is not one yet."""
    from vllm.exceptions import VLLMError, VLLMUnprocessableEntityError

    try:
        yield
    except (ValueError, VLLMError, MemoryError):
        raise
    except Exception as error:
        raise VLLMUnprocessableEntityError(
            f"the media at this URL cannot be used: {error or type(error).__name__}",
            parameter="image_url",
        ) from error


def _explaining(original: Callable[..., Any]) -> Callable[..., Any]:
    @extending(original, __name__)
    def load_from_url(*args: Any, **kwargs: Any) -> Any:
        with _clients_error():
            return original(*args, **kwargs)

    return load_from_url


def _explaining_later(original: Callable[..., Any]) -> Callable[..., Any]:
    @extending(original, __name__)
    async def load_from_url_async(*args: Any, **kwargs: Any) -> Any:
        with _clients_error():
            return await original(*args, **kwargs)

    return load_from_url_async


def _direct(connection: type) -> type:
    """A connection that follows no redirect, whatever it is told."""

    class DirectConnection(connection):
        def get_response(self, url: str, **kwargs: Any) -> Any:
            return super().get_response(url, **kwargs | {"allow_redirects": False})

        async def get_async_response(self, url: str, **kwargs: Any) -> Any:
            return await super().get_async_response(url, **kwargs | {"allow_redirects": False})

    return DirectConnection


def _staying(original: Callable[..., None], shared: Any, direct: Any) -> Callable[..., None]:
    """Keeps a connector to its allowed domains: vLLM checks a URL, not where it redirects to.

    Args:
        original: ``MediaConnector.__init__``.
        shared: the connection of every connector that is given none.
        direct: takes its place where there are allowed domains.
    """

    @extending(original, __name__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.allowed_media_domains and self.connection is shared:
            self.connection = direct

    return __init__

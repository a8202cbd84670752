# SPDX-License-Identifier: Apache-2.0
"""Pictures and ready-made embeddings side by side in one chat.

vLLM collects a chat's images by kind, and forgets their order. Where there are both kinds, an
embedding is handed to it as an image that needs no loading (``image_pil``), which it passes on as
it is, in the order of the chat; the prompt that comes of it is one with mixed images.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

PICTURES = ("image_url", "input_image", "image_pil")
EMBEDDING = "image_embeds"
"""vLLM's types of content parts that hold an image, and the names of their fields."""


class LoadedEmbedding:
    """An embedding in the place of a loaded picture.

    Args:
        rows: ``(num_features, hidden_size)``, or what a client sent as such.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    @property
    def size(self) -> tuple[int, int]:
        """As of a picture, whose pixels vLLM counts before it takes it."""
        return self.rows.numel(), 1


def unwrapped(image: Any) -> Any:
    """An image as vLLM knows it."""
    return image.rows if isinstance(image, LoadedEmbedding) else image


def read_once(message: Any) -> Any:
    """A message whose content can be read again: vLLM's validate it while it is iterated, once."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, Iterable) or isinstance(content, (str, Mapping, list)):
        return message
    return {**message, "content": list(content)}


def embeddings_among_pictures(messages: Sequence[Any]) -> list[Any]:
    """The embeddings of a chat as its parts give them; none where there are no pictures.

    Raises:
        VLLMValidationError: one is given as an object with several tensors.
    """
    from vllm.exceptions import VLLMValidationError

    kinds = [(_kind(part), part) for part in _parts(messages)]
    embeddings = [part.get(EMBEDDING) for kind, part in kinds if kind == EMBEDDING]
    if not any(kind in PICTURES for kind, _ in kinds):
        return []
    if any(isinstance(embedding, Mapping) for embedding in embeddings):
        raise VLLMValidationError(
            "image_embeds beside pictures must be one tensor for each image, not an object",
            parameter=EMBEDDING,
        )
    return embeddings


def with_loaded(messages: Sequence[Any], embeddings: Iterable[Any]) -> list[Any]:
    """A chat whose embeddings are images that are loaded.

    Args:
        messages: of the chat.
        embeddings: tensors ``(num_features, hidden_size)`` in the order of the chat; None for one
            that is named by its ``uuid`` alone.
    """
    loaded = iter(embeddings)

    def replaced(part: Any) -> Any:
        if _kind(part) != EMBEDDING:
            return part
        others = {name: part[name] for name in part if name not in ("type", EMBEDDING)}
        rows = next(loaded)
        return {"image_pil": None if rows is None else LoadedEmbedding(rows), **others}

    return [
        {**message, "content": [replaced(part) for part in message["content"]]}
        if _has_parts(message)
        else message
        for message in messages
    ]


def _has_parts(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("content"), list)


def _parts(messages: Sequence[Any]) -> Iterator[Any]:
    for message in messages:
        if _has_parts(message):
            yield from message["content"]


def _kind(part: Any) -> str | None:
    """The type of a content part that holds an image; it may be said by the fields alone."""
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type")
    if kind is None:
        kind = next((name for name in (*PICTURES, EMBEDDING) if name in part), None)
    return kind if kind in (*PICTURES, EMBEDDING) else None

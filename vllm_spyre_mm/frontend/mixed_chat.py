# SPDX-License-Identifier: Apache-2.0
"""Ready-made embeddings in a chat: beside pictures or videos, or as objects of several tensors.

vLLM collects a chat's items by kind, and forgets their order; and it pads embeddings of different
widths to one. So each is loaded here, and handed to it as an item that needs no loading, which it
passes on as it is, in the order of the chat: an image as ``image_pil``, a video as a URL that has
it (``LoadedUrl``), which the platform's connector knows. The prompt that comes of it is one
with mixed items.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from vllm_spyre_mm.vllm_fixes.media_connector import LoadedUrl

MEDIA = {"image": ("image_url", "input_image", "image_pil"), "video": ("video_url",)}
EMBEDDINGS = {"image": "image_embeds", "video": "video_embeds"}
"""vLLM's types of content parts that hold an item of each modality, and the names of their fields.
"""


class LoadedEmbedding:
    """An embedding in the place of a loaded picture or video.

    Args:
        embedding: ``(num_features, width)``, or an object with such a tensor and others.
    """

    def __init__(self, embedding: torch.Tensor | Mapping[str, Any]) -> None:
        self.embedding = embedding

    @property
    def size(self) -> tuple[int, int]:
        """As of a picture, whose pixels vLLM counts before it takes it."""
        given = self.embedding
        tensors = given.values() if isinstance(given, Mapping) else (given,)
        return sum(each.numel() for each in tensors if isinstance(each, torch.Tensor)), 1


def unwrapped(item: Any) -> Any:
    """An item as vLLM knows it."""
    return item.embedding if isinstance(item, LoadedEmbedding) else item


def read_once(message: Any) -> Any:
    """A message whose content can be read again: vLLM's validate it while it is iterated, once."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, Iterable) or isinstance(content, (str, Mapping, list)):
        return message
    return {**message, "content": list(content)}


def embeddings_to_load(messages: Sequence[Any], modality: str, *, has_grid: bool) -> list[Any]:
    """The embeddings of a chat as its parts give them; none where vLLM takes them as they are.

    Args:
        messages: of the chat.
        modality: vLLM's name.
        has_grid: whether the model takes embeddings as objects with several tensors.

    Raises:
        VLLMValidationError: one beside pictures is such an object, and the model takes none.
    """
    from vllm.exceptions import VLLMValidationError

    name = EMBEDDINGS[modality]
    kinds = [(_kind(part, modality), part) for part in _parts(messages)]
    embeddings = [part.get(name) for kind, part in kinds if kind == name]
    has_media = any(kind in MEDIA[modality] for kind, _ in kinds)
    has_objects = any(isinstance(embedding, Mapping) for embedding in embeddings)
    if has_grid:
        return embeddings
    if has_objects and has_media:
        raise VLLMValidationError(
            "image_embeds beside pictures must be one tensor for each image, not an object",
            parameter=name,
        )
    return embeddings if has_media else []


def with_loaded(messages: Sequence[Any], modality: str, embeddings: Iterable[Any]) -> list[Any]:
    """A chat whose embeddings are items that are loaded.

    Args:
        messages: of the chat.
        modality: vLLM's name.
        embeddings: each ``(num_features, width)`` or an object with such a tensor, in the order of
            the chat; None for one that is named by its ``uuid`` alone.
    """
    loaded, name = iter(embeddings), EMBEDDINGS[modality]

    def replaced(part: Any) -> Any:
        if _kind(part, modality) != name:
            return part
        others = {field: part[field] for field in part if field not in ("type", name)}
        embedding = next(loaded)
        item: Any = None if embedding is None else LoadedEmbedding(embedding)
        if modality == "video":
            return {"video_url": None if item is None else LoadedUrl(item), **others}
        return {"image_pil": item, **others}

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


def _kind(part: Any, modality: str) -> str | None:
    """The type of a content part that holds an item; it may be said by the fields alone."""
    if not isinstance(part, Mapping):
        return None
    names = (*MEDIA[modality], EMBEDDINGS[modality])
    kind = part.get("type")
    if kind is None:
        kind = next((name for name in names if name in part), None)
    return kind if kind in names else None

# SPDX-License-Identifier: Apache-2.0
"""Media and ready-made embeddings side by side in one prompt, in any order.

vLLM takes items of a modality of one kind. Each kind is given to it by itself, and the results are
put back into the order of the prompt.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from vllm.multimodal.parse import (
    DictEmbeddingItems,
    EmbeddingItems,
    ModalityDataItems,
    MultiModalDataItems,
)


class Mixture:
    """Which items of a prompt are pictures or videos, and which are embeddings.

    Args:
        is_embedding: for each item of a modality, in the order of the prompt.
    """

    def __init__(self, is_embedding: Iterable[bool]) -> None:
        self.is_embedding = tuple(is_embedding)

    def indices(self, *, embeddings: bool) -> list[int]:
        """Where in the prompt the items of one kind are."""
        return self.select(range(len(self.is_embedding)), embeddings=embeddings)

    def select(self, values: Iterable[Any], *, embeddings: bool) -> list[Any]:
        """Those values, one for each item, that belong to one kind."""
        pairs = zip(values, self.is_embedding, strict=True)
        return [value for value, is_embedding in pairs if is_embedding == embeddings]

    def merge(self, media: Iterable[Any], embeddings: Iterable[Any]) -> list[Any]:
        """The values of both kinds in the order of the prompt."""
        of_media, of_embeddings = iter(media), iter(embeddings)
        return [
            next(of_embeddings if is_embedding else of_media) for is_embedding in self.is_embedding
        ]


def mixture_of(items: object) -> Mixture | None:
    """The mixture that a prompt's items of a modality are; None where all are of one kind.

    A matrix is an embedding, and so is an object with several tensors; vLLM looks at the first item
    alone.
    """
    if not isinstance(items, (list, tuple)):
        return None
    is_embedding = [_is_embedding(item) for item in items]
    return Mixture(is_embedding) if any(is_embedding) and not all(is_embedding) else None


def are_embeddings(items: object) -> bool:
    """Whether all items of a modality are embeddings: one, several, or a tensor of several."""
    if isinstance(items, (list, tuple)):
        return bool(items) and all(_is_embedding(item) for item in items)
    return _is_embedding(items) or (isinstance(items, torch.Tensor) and items.ndim == 3)


def _is_embedding(item: object) -> bool:
    return isinstance(item, Mapping) or (isinstance(item, torch.Tensor) and item.ndim == 2)


class MixedItems(ModalityDataItems[list[Any], Any]):
    """Items of both kinds.

    Attributes:
        mixture: which are which.
        media: vLLM's items of the pictures or videos.
        embeddings: vLLM's items of the embeddings.
    """

    def __init__(self, mixture: Mixture, media: Any, embeddings: Any) -> None:
        super().__init__(mixture.merge(media.get_all(), embeddings.get_all()), media.modality)
        self.mixture, self.media, self.embeddings = mixture, media, embeddings

    def get_count(self) -> int:
        return len(self.data)

    def get(self, index: int) -> Any:
        return self.data[index]

    def get_processor_data(self) -> Mapping[str, object]:
        data: Mapping[str, object] = self.media.get_processor_data()
        return data

    def get_passthrough_data(self) -> Mapping[str, object]:
        data: Mapping[str, object] = self.embeddings.get_passthrough_data()
        return data


def by_kind(items: MultiModalDataItems) -> tuple[MultiModalDataItems, MultiModalDataItems]:
    """The pictures and videos of a prompt, and its embeddings, each by their modality."""
    media, embeddings = {}, {}
    for modality, of_modality in items.items():
        if isinstance(of_modality, MixedItems):
            media[modality] = of_modality.media
            embeddings[modality] = of_modality.embeddings
        elif isinstance(of_modality, (EmbeddingItems, DictEmbeddingItems)):
            embeddings[modality] = of_modality
        else:
            media[modality] = of_modality
    return MultiModalDataItems(media), MultiModalDataItems(embeddings)

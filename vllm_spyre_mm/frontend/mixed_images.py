# SPDX-License-Identifier: Apache-2.0
"""Pictures and ready-made embeddings side by side in one prompt, in any order.

vLLM takes images of one kind. Each kind is given to it by itself, and the results are put back into
the order of the prompt.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from vllm.multimodal.parse import ModalityDataItems


class Mixture:
    """Which images of a prompt are pictures, and which are embeddings.

    Args:
        is_embedding: for each image, in the order of the prompt.
    """

    def __init__(self, is_embedding: Iterable[bool]) -> None:
        self.is_embedding = tuple(is_embedding)

    def indices(self, *, embeddings: bool) -> list[int]:
        """Where in the prompt the images of one kind are."""
        return self.select(range(len(self.is_embedding)), embeddings=embeddings)

    def select(self, values: Iterable[Any], *, embeddings: bool) -> list[Any]:
        """Those values, one for each image, that belong to one kind."""
        pairs = zip(values, self.is_embedding, strict=True)
        return [value for value, is_embedding in pairs if is_embedding == embeddings]

    def merge(self, pictures: Iterable[Any], embeddings: Iterable[Any]) -> list[Any]:
        """The values of both kinds in the order of the prompt."""
        of_pictures, of_embeddings = iter(pictures), iter(embeddings)
        return [
            next(of_embeddings if is_embedding else of_pictures)
            for is_embedding in self.is_embedding
        ]


def mixture_of(images: object) -> Mixture | None:
    """The mixture that a prompt's images are; None where all are of one kind.

    A matrix is an embedding; vLLM looks at the first image alone.
    """
    if not isinstance(images, (list, tuple)):
        return None
    is_embedding = [isinstance(image, torch.Tensor) and image.ndim == 2 for image in images]
    return Mixture(is_embedding) if any(is_embedding) and not all(is_embedding) else None


class MixedImageItems(ModalityDataItems[list[Any], Any]):
    """Images of both kinds.

    Attributes:
        mixture: which are which.
        pictures: vLLM's items of the pictures.
        embeddings: vLLM's items of the embeddings.
    """

    def __init__(self, mixture: Mixture, pictures: Any, embeddings: Any) -> None:
        super().__init__(mixture.merge(pictures.get_all(), embeddings.get_all()), "image")
        self.mixture, self.pictures, self.embeddings = mixture, pictures, embeddings

    def get_count(self) -> int:
        return len(self.data)

    def get(self, index: int) -> Any:
        return self.data[index]

    def get_processor_data(self) -> Mapping[str, object]:
        data: Mapping[str, object] = self.pictures.get_processor_data()
        return data

    def get_passthrough_data(self) -> Mapping[str, object]:
        data: Mapping[str, object] = self.embeddings.get_passthrough_data()
        return data

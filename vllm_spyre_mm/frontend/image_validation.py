# SPDX-License-Identifier: Apache-2.0
"""Refuses images that cannot be used, with a sentence, before they are processed."""

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from vllm_spyre_mm.multimodal.feature_check import fault_of_embedding

if TYPE_CHECKING:
    from vllm.config import MultiModalConfig


def validate_images(images: Iterable[object], indices: Iterable[int] | None = None) -> None:
    """Refuse what is no picture, has no pixels, or some that are no numbers.

    Args:
        images: PIL pictures and arrays of a prompt, in its order; None for one that is named by
            its ``uuid`` alone.
        indices: where in the prompt they are; None where they are all of its images.

    Raises:
        VLLMValidationError: says which picture, how large it is, and what is wrong with it.
    """
    from PIL import Image
    from vllm.exceptions import VLLMValidationError

    from vllm_spyre_mm.multimodal.pictures import fault_of_picture

    for index, image in zip(indices or itertools.count(), images, strict=False):
        fault = None
        if isinstance(image, Image.Image):
            if 0 in image.size:
                fault = f"is empty: {image.width}x{image.height} pixels (width x height)"
        elif image is not None:
            fault = fault_of_picture(image)
        if fault is not None:
            raise VLLMValidationError(
                f"image {index} of the prompt {fault}",
                parameter="image",
            )


def validate_mixture(multimodal: "MultiModalConfig") -> None:
    """Refuse embeddings among pictures where the engine takes none; vLLM checks embeddings alone.

    Raises:
        VLLMValidationError: says what to start the engine with.
    """
    from vllm.exceptions import VLLMValidationError

    if not multimodal.enable_mm_embeds:
        raise VLLMValidationError(
            "an image of the prompt is given as an embedding: start the engine with "
            "enable_mm_embeds=True or --enable-mm-embeds",
            parameter="image",
        )


def validate_image_embeddings(
    embeddings: Iterable[torch.Tensor], hidden_size: int, indices: Iterable[int] | None = None
) -> None:
    """Refuse ready-made image features that the decoder cannot take.

    Args:
        embeddings: of a prompt's images, ``(num_features, hidden_size)`` each.
        hidden_size: of the decoder.
        indices: where in the prompt they are; None where they are all of its images.

    Raises:
        VLLMValidationError: says which one, and whether its rank, width, rows, dtype or values.
    """
    from vllm.exceptions import VLLMValidationError

    for index, embedding in zip(indices or itertools.count(), embeddings, strict=False):
        fault = fault_of_embedding(embedding, hidden_size)
        if fault is not None:
            raise VLLMValidationError(
                f"image embedding {index} of the prompt, of shape {tuple(embedding.shape)}, cannot "
                f"be used: {fault}",
                parameter="image",
            )


def validate_tags(modality: str, num_items: int, num_tags: int) -> None:
    """Refuse a prompt with fewer tags than pictures.

    Args:
        modality: vLLM's name, ``image``.
        num_items: given beside the prompt.
        num_tags: found in it, one at most for each.

    Raises:
        VLLMValidationError: names both counts.
    """
    from vllm.exceptions import VLLMValidationError

    if num_tags < num_items:
        raise VLLMValidationError(
            f"the prompt has {num_tags} {modality} tag(s) for {num_items} {modality}(s): put one "
            "tag into the prompt for each",
            parameter=modality,
        )

# SPDX-License-Identifier: Apache-2.0
"""Refuses images that cannot be used, with a sentence, before they are processed."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from vllm_spyre_mm.multimodal.feature_check import fault_of_embedding

if TYPE_CHECKING:
    from vllm.config import MultiModalConfig
    from vllm.multimodal.inputs import PlaceholderRange

    from vllm_spyre_mm.multimodal.mm_mappings import MMUtils


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


def validate_takes_embeddings(multimodal: "MultiModalConfig", modality: str) -> None:
    """Refuse embeddings where the engine takes none; vLLM checks tensors that are alone.

    Args:
        multimodal: of the engine.
        modality: vLLM's name of what is given so.

    Raises:
        VLLMValidationError: says what to start the engine with.
    """
    from vllm.exceptions import VLLMValidationError

    if not multimodal.enable_mm_embeds:
        raise VLLMValidationError(
            f"an item of the prompt ({modality}) is given as an embedding: start the engine with "
            "enable_mm_embeds=True or --enable-mm-embeds",
            parameter=modality,
        )


def validate_laid_out(mapping: "MMUtils", modality: str) -> None:
    """Refuse embeddings of a modality for which vLLM's processor makes no placeholder of them.

    Args:
        mapping: of the model.
        modality: vLLM's name of what is given so.

    Raises:
        VLLMValidationError: says what to give instead.
    """
    from vllm.exceptions import VLLMValidationError

    if modality in set(mapping.modalities) - set(mapping.embedding_modalities):
        raise VLLMValidationError(
            f"an item of the prompt ({modality}) is given as an embedding, which vLLM cannot lay "
            f"out for this model: give the {modality} itself",
            parameter=modality,
        )


def validate_image_embeddings(
    embeddings: Iterable[torch.Tensor],
    width: int,
    indices: Iterable[int] | None = None,
    modality: str = "image",
) -> None:
    """Refuse ready-made features that the decoder cannot take.

    Args:
        embeddings: of a prompt's images or videos, ``(num_features, width)`` each.
        width: elements of a feature, its levels included.
        indices: where in the prompt they are; None where they are all of its images or videos.
        modality: vLLM's name.

    Raises:
        VLLMValidationError: says which one, and whether its rank, width, rows, dtype or values.
    """
    from vllm.exceptions import VLLMValidationError

    for index, embedding in zip(indices or itertools.count(), embeddings, strict=False):
        fault = fault_of_embedding(embedding, width)
        if fault is not None:
            raise VLLMValidationError(
                f"{modality} embedding {index} of the prompt, of shape {tuple(embedding.shape)}, "
                f"cannot be used: {fault}",
                parameter=modality,
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


def validate_length(videos: "Sequence[PlaceholderRange]", max_model_len: int) -> None:
    """Refuse a video that alone is longer than a prompt may be, and say what makes it shorter.

    Args:
        videos: their places in the prompt, in its order.
        max_model_len: of the engine, in tokens.

    Raises:
        VLLMValidationError: names both numbers.
    """
    from vllm.exceptions import VLLMValidationError

    for index, place in enumerate(videos):
        if place.length > max_model_len:
            raise VLLMValidationError(
                f"video {index} of the prompt takes {place.length} tokens, and max_model_len is "
                f"{max_model_len}: choose fewer frames (fps or max_frames in media_io_kwargs) or "
                "smaller ones (max_pixels in mm_processor_kwargs)",
                parameter="video",
            )


@contextlib.contextmanager
def processing_error() -> Iterator[None]:
    """Says what a processor of Transformers found wrong, which vLLM only chains.

    Raises:
        VLLMValidationError: in place of vLLM's ValueError, which prints the pixels.
    """
    from vllm.exceptions import VLLMValidationError

    try:
        yield
    except ValueError as error:
        if error.__cause__ is None or not str(error).startswith("Failed to apply "):
            raise
        raise VLLMValidationError(
            "the model's processor refuses the images or videos of the prompt, with the "
            "mm_processor_kwargs that are given: "
            f"{type(error.__cause__).__name__}: {error.__cause__}",
            parameter="mm_processor_kwargs",
        ) from error

# SPDX-License-Identifier: Apache-2.0
"""Encodes the images of a step; a failure is the failure of one request.

The scheduler gives a prefill a step of its own, so the images of a step belong to one request. If
the encoder raises, runs out of memory or returns NaN, that request fails; the engine and the other
requests go on.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.multimodal.utils import group_and_batch_mm_kwargs

from vllm_spyre_mm.model_executor.model import SpyreModel
from vllm_spyre_mm.multimodal.feature_check import FeatureError, check_features

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


class ImageEncodingError(RuntimeError):
    """The images of a step cannot be encoded; nothing of the step entered a cache.

    Attributes:
        on_every_rank: whether every rank of a tensor-parallel model fails at the same place, so
            that none waits for another.
    """

    def __init__(self, message: str, *, on_every_rank: bool) -> None:
        super().__init__(message)
        self.on_every_rank = on_every_rank


def encode_images(
    model: SpyreModel,
    images: "Mapping[int, MultiModalFeatureSpec]",
    dtype: torch.dtype,
    decoder_dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Encode images together; returns the features of each, ``(num_features, hidden_size)``.

    Args:
        model: with the vision encoder.
        images: of one request, by their index among all of its images; those given as embeddings
            are only converted.
        dtype: of the encoder and of the result.
        decoder_dtype: dtype that the features are converted to when they are merged.

    Raises:
        ImageEncodingError: the encoder raised, or :func:`check_features` refused its output.
    """
    try:
        encoded = _encode(model, list(images.values()), dtype)
    # A vision tower may raise anything; the log has the traceback.
    except Exception as error:
        raise ImageEncodingError(
            f"{_named(images)} could not be encoded: {type(error).__name__}: {error}",
            on_every_rank=False,
        ) from error
    for (index, feature), features in zip(images.items(), encoded, strict=True):
        try:
            check_features(features, feature.mm_position.get_num_embeds(), decoder_dtype)
        except FeatureError as error:
            raise ImageEncodingError(
                f"{_named([index])} was encoded to {error}", on_every_rank=True
            ) from error
    return encoded


def _named(indices: Iterable[int]) -> str:
    """Images in words, by their place in the request, counted from 1."""
    numbers = [str(index + 1) for index in indices]
    return f"image{'s' if len(numbers) > 1 else ''} {', '.join(numbers)} of the request"


def _encode(
    model: SpyreModel, features: "Sequence[MultiModalFeatureSpec]", dtype: torch.dtype
) -> list[torch.Tensor]:
    mm_kwargs: list[tuple[str, Any]] = [(feature.modality, feature.data) for feature in features]
    encoded: list[torch.Tensor] = []
    for _, _, batch in group_and_batch_mm_kwargs(mm_kwargs):
        given: Any = batch.get("image_embeds")
        if given is not None:
            encoded.extend(each.to(dtype) for each in given)
        else:
            encoded.extend(model.encode(batch))
    return encoded

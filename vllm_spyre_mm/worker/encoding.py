# SPDX-License-Identifier: Apache-2.0
"""Encodes the images and videos of a step; a failure is the failure of one request.

The scheduler gives a prefill a step of its own, so the items of a step belong to one request. If
the encoder raises, runs out of memory or returns NaN, that request fails; the engine and the other
requests go on.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.multimodal.utils import group_and_batch_mm_kwargs

from vllm_spyre_mm.model_executor.model import SpyreModel
from vllm_spyre_mm.model_executor.pieces import Pieces, whole
from vllm_spyre_mm.multimodal.feature_check import FeatureError, check_item
from vllm_spyre_mm.multimodal.given_features import given_features
from vllm_spyre_mm.multimodal.item_names import named
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils
from vllm_spyre_mm.worker.ranks import FirstRankError, Ranks

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


class ImageEncodingError(RuntimeError):
    """The images of a step cannot be encoded; nothing of the step entered a cache."""


class ImageEncoder:
    """Encodes the images of a step on the first rank, with the threads of all of them.

    Args:
        model: with the vision encoder, which is whole on each rank.
        ranks: of the model.
        dtype: of the encoder.
        decoder_dtype: what the features are converted to when they are merged.
    """

    def __init__(
        self,
        model: SpyreModel[MMUtils],
        ranks: Ranks,
        dtype: torch.dtype,
        decoder_dtype: torch.dtype,
    ) -> None:
        self.model, self.ranks = model, ranks
        self.dtype, self.decoder_dtype = dtype, decoder_dtype

    def encode(self, images: "Mapping[int, MultiModalFeatureSpec]") -> list[torch.Tensor]:
        """Features of each image, ``(num_features, feature_width)``, on every rank.

        Args:
            images: of one request, by their index among all of its images.

        Raises:
            ImageEncodingError: as for :func:`encode_images`, on every rank.
            FirstRankError: on the others, as soon as anything else was raised on the first.
        """
        if not self.ranks.is_first:
            return self.ranks.receive_tensors()
        try:
            with threads(self.ranks.num_threads):
                encoded = encode_images(self.model, images, self.dtype, self.decoder_dtype)
        except ImageEncodingError as error:
            self.ranks.broadcast_object(error)
            raise
        except Exception as error:  # the other ranks wait for it
            self.ranks.broadcast_object(FirstRankError.of(error))
            raise
        self.ranks.send_tensors(encoded)
        return encoded


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let PyTorch's operators take a number of threads, None for what they have."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def encode_images(
    model: SpyreModel[MMUtils],
    images: "Mapping[int, MultiModalFeatureSpec]",
    dtype: torch.dtype,
    decoder_dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Encode images together; returns the features of each, ``(num_features, feature_width)``.

    Args:
        model: with the vision encoder.
        images: items of one request, by their index among all of them, videos included; those
            given as embeddings are only converted.
        dtype: of the encoder and of the result.
        decoder_dtype: dtype that the features are converted to when they are merged.

    Raises:
        ImageEncodingError: the encoder raised, or :func:`check_features` refused its output.
    """
    try:
        encoded = whole(encode_pieces(model, list(images.values()), dtype))
    # A vision tower may raise anything; the log has the traceback.
    except Exception as error:
        raise ImageEncodingError(
            f"{named(images)} could not be encoded: {type(error).__name__}: {error}"
        ) from error
    for (index, feature), features in zip(images.items(), encoded, strict=True):
        try:
            check_item(feature, features, model.mapping.feature_width, decoder_dtype)
        except FeatureError as error:
            raise ImageEncodingError(f"{named({index: feature})} was encoded to {error}") from error
    return encoded


def encode_pieces(
    model: SpyreModel, features: "Sequence[MultiModalFeatureSpec]", dtype: torch.dtype
) -> Pieces[list[torch.Tensor]]:
    """Encode images together, in pieces; returns the features of each in the dtype, unchecked.

    Args:
        model: with the vision encoder.
        features: items, videos included; those given as embeddings are only converted.
        dtype: of the result.
    """
    made = [given_features(feature) for feature in features]
    mm_kwargs: list[tuple[str, Any]] = [
        (feature.modality, feature.data)
        for feature, given in zip(features, made, strict=True)
        if given is None
    ]
    encoded: list[torch.Tensor] = []
    for _, _, batch in group_and_batch_mm_kwargs(mm_kwargs):
        encoded += yield from model.encode_pieces(batch)
    places = [place for place, given in enumerate(made) if given is None]
    for place, rows in zip(places, encoded, strict=True):
        made[place] = rows
    return [rows.to(dtype) for rows in made if rows is not None]

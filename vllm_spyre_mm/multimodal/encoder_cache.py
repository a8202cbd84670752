# SPDX-License-Identifier: Apache-2.0
"""The worker's cache of encoded images; vLLM's scheduler decides what is stored and evicted."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from vllm_spyre_mm.multimodal.feature_check import FeatureError, check_count
from vllm_spyre_mm.multimodal.merge import FeatureSlice

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


class FeatureCountError(RuntimeError):
    """The number of an image's features differs from its placeholder in the prompt."""


class EncoderCache:
    """Features of encoded images by content identifier.

    Every entry is a whole image, ``(num_features, hidden_size)``, and is never modified, so a
    reference may be kept past its eviction.

    Attributes:
        tensors: the entries by identifier, as an EC connector of vLLM's takes and fills them.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def __contains__(self, identifier: str) -> bool:
        return identifier in self.tensors

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def num_bytes(self) -> int:
        """Memory held by the cached features."""
        return sum(features.nbytes for features in self.tensors.values())

    def put(self, feature: "MultiModalFeatureSpec", features: torch.Tensor) -> None:
        """Store the features of an image.

        Args:
            feature: the image as a request refers to it.
            features: ``(num_features, hidden_size)``; :func:`check_feature_count` accepts them.
        """
        self.tensors[feature.identifier] = features

    def get(self, feature: "MultiModalFeatureSpec") -> torch.Tensor:
        """The features of an image, ``(num_features, hidden_size)``.

        Raises:
            KeyError: vLLM's scheduler did not have it encoded before it was needed.
            FeatureCountError: the cached image has another number of features than the request's
                placeholder; two images share an identifier.
        """
        features = self.tensors.get(feature.identifier)
        if features is None:
            raise KeyError(
                f"the features of image {feature.identifier!r} are not in the encoder cache, "
                "although the scheduler did not ask for it to be encoded"
            )
        check_feature_count(feature, features)
        return features

    def evict(self, identifiers: Iterable[str]) -> None:
        """Remove images; unknown ones, of aborted requests that never encoded, are ignored."""
        for identifier in identifiers:
            self.tensors.pop(identifier, None)

    def clear(self) -> None:
        """Remove all images."""
        self.tensors.clear()

    def gather(
        self, mm_features: Sequence["MultiModalFeatureSpec"], slices: Iterable[FeatureSlice]
    ) -> list[torch.Tensor]:
        """Views of slices of the features of a request's images."""
        return [self.get(mm_features[part.item])[part.start : part.end] for part in slices]


def check_feature_count(feature: "MultiModalFeatureSpec", features: torch.Tensor) -> None:
    """Compare the features of an image with its placeholder.

    Raises:
        FeatureCountError: names both counts.
    """
    try:
        check_count(features, feature.mm_position.get_num_embeds())
    except FeatureError as error:
        raise FeatureCountError(f"image {feature.identifier!r} was encoded to {error}") from None

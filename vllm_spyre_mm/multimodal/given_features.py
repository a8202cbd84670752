# SPDX-License-Identifier: Apache-2.0
"""Items of a prompt that are given as ready-made features."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


def given_features(feature: "MultiModalFeatureSpec") -> torch.Tensor | None:
    """The features of an item that was given as such, ``(num_features, width)``.

    Args:
        feature: of any modality; None is returned for one that has to be encoded, and for one
            whose data are not at hand.
    """
    key = f"{feature.modality}_embeds"
    if feature.data is None or key not in feature.data:
        return None
    rows = feature.data[key].data
    assert isinstance(rows, torch.Tensor), "one item's features are one tensor"
    return rows

# SPDX-License-Identifier: Apache-2.0
"""Items of a request in words."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


def named(items: "Mapping[int, MultiModalFeatureSpec]") -> str:
    """Items in words, by their place among all of the request's, counted from 1."""
    numbers: dict[str, list[str]] = {}
    for index, feature in items.items():
        numbers.setdefault(feature.modality, []).append(str(index + 1))
    kinds = (
        f"{modality}{'s' if len(of) > 1 else ''} {', '.join(of)}"
        for modality, of in numbers.items()
    )
    return f"{' and '.join(kinds)} of the request"

# SPDX-License-Identifier: Apache-2.0
"""The tensors of an item of a prompt, which say how much work and memory it is."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


def num_values(feature: "MultiModalFeatureSpec") -> int:
    """Elements of an item's tensors, pixel values for the most part."""
    return sum(tensor.numel() for tensor in _item_tensors(feature))


def num_bytes(feature: "MultiModalFeatureSpec") -> int:
    """Memory of an item's tensors."""
    return sum(tensor.nbytes for tensor in _item_tensors(feature))


def _item_tensors(feature: "MultiModalFeatureSpec") -> Iterator[torch.Tensor]:
    """What vLLM's processor made of an item; none if its data are not at hand."""
    for element in (feature.data or {}).values():
        yield from _tensors(element.data)


def _tensors(data: Any) -> Iterator[torch.Tensor]:
    if isinstance(data, torch.Tensor):
        yield data
    elif isinstance(data, list | tuple):
        for each in data:
            yield from _tensors(each)

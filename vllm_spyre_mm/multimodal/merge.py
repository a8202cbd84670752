# SPDX-License-Identifier: Apache-2.0
"""Merges image features into text embeddings, with static shapes and no in-place writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

TEXT = -1
"""Feature index of a position that keeps its text embedding."""


def first_feature(position: "PlaceholderRange") -> int:
    """Position in the prompt of an image's first feature.

    A placeholder may begin with text tokens; vLLM has an image encoded for the chunk that reaches
    this position, not for one that only reaches the placeholder.

    Args:
        position: of an image that has features.
    """
    mask = position.is_embed
    return position.offset if mask is None else position.offset + int(mask.int().argmax())


def merge_embeddings(
    text: torch.Tensor, features: torch.Tensor, feature_index: torch.Tensor
) -> torch.Tensor:
    """Replace text embeddings by image features, position by position.

    The shape of the result depends on the shapes of the arguments alone, so this compiles to one
    graph; rows of the batch are independent.

    Args:
        text: ``(batch, length, hidden_size)``.
        features: ``(num_features, hidden_size)``, at least one row, same dtype and device.
        feature_index: int64 ``(batch, length)``: the row of ``features`` that goes to each
            position, or :data:`TEXT`.

    Returns:
        A new tensor shaped like ``text``.
    """
    rows = features[feature_index.clamp(min=0)]
    return torch.where((feature_index == TEXT).unsqueeze(-1), text, rows)


def merge_levels(
    text: torch.Tensor, levels: torch.Tensor, feature_index: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Put the levels of image features at their positions, with zeros on text.

    Args:
        text: ``(batch, length, hidden_size)``; only its shape, dtype and device matter.
        levels: ``(num_features, levels * hidden_size)``, a level's columns side by side.
        feature_index: as in :func:`merge_embeddings`.

    Returns:
        For each level a tensor like ``text``, to be added to hidden states.
    """
    zeros = torch.zeros_like(text)
    return tuple(
        merge_embeddings(zeros, columns, feature_index)
        for columns in levels.split(text.shape[-1], dim=-1)
    )


@dataclass(frozen=True, slots=True)
class FeatureSlice:
    """Rows of one image's features that a chunk of the prompt needs.

    Attributes:
        item: index into the request's ``mm_features``.
        start: first row of the image's features.
        end: one past the last row.
    """

    item: int
    start: int
    end: int


def plan_merge(
    mm_features: Sequence["MultiModalFeatureSpec"], start: int, end: int
) -> tuple[list[FeatureSlice], np.ndarray]:
    """Map the prompt positions ``[start, end)`` to rows of the images' features.

    Positions come from each placeholder's range and its ``is_embed`` mask; token ids play no part.

    Args:
        mm_features: the request's images in prompt order.
        start: first position of the chunk.
        end: one past its last position.

    Returns:
        The slices to concatenate, in prompt order, and an int64 array ``(end - start,)``: the row
        of that concatenation for each position, or :data:`TEXT`.
    """
    slices: list[FeatureSlice] = []
    index = np.full(end - start, TEXT, dtype=np.int64)
    num_rows = 0
    for item, feature in enumerate(mm_features):
        position = feature.mm_position
        first = max(start, position.offset)
        last = min(end, position.offset + position.length)
        if first >= last:
            continue
        row_start, row_end = position.get_embeds_indices_in_range(
            first - position.offset, last - position.offset
        )
        if row_start == row_end:
            continue
        here = np.arange(first - start, last - start)
        if position.is_embed is not None:
            here = here[position.is_embed[first - position.offset : last - position.offset].numpy()]
        count = row_end - row_start
        index[here] = np.arange(num_rows, num_rows + count)
        num_rows += count
        slices.append(FeatureSlice(item, row_start, row_end))
    return slices, index


def first_without_row(
    token_ids: Sequence[int], mm_features: Sequence["MultiModalFeatureSpec"], num_rows: int
) -> int | None:
    """First position of a prompt with a text token that has no row in the text embedding, or None.

    A tokenizer may have tokens without a row, the image token among them: positions that features
    replace need none.

    Args:
        token_ids: of the whole prompt, placeholders expanded.
        mm_features: its images in prompt order.
        num_rows: of the text embedding.
    """
    _, index = plan_merge(mm_features, 0, len(token_ids))
    without = (np.asarray(token_ids) >= num_rows) & (index == TEXT)
    return int(without.argmax()) if without.any() else None


def mask_feature_tokens(token_ids: torch.Tensor, feature_index: torch.Tensor) -> torch.Tensor:
    """Token ids with 0 where features go: an image token may have no row in the text embedding.

    Args:
        token_ids: int64 ``(batch, length)``.
        feature_index: as in :func:`merge_embeddings`.
    """
    return token_ids.masked_fill(feature_index != TEXT, 0)

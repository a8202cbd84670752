# SPDX-License-Identifier: Apache-2.0
"""The embedding that a request gets back, made of its items' features by its choice.

The worker pools and converts, so that no more is sent than was asked for.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice, ItemSize
from vllm_spyre_mm.multimodal.feature_check import dtype_name
from vllm_spyre_mm.multimodal.feature_layout import FeatureLayout
from vllm_spyre_mm.multimodal.pooling import EmbeddingFault, choose_levels, convert, pool

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


class MMEmbeddingItem(msgspec.Struct, frozen=True):
    """One image or video of an embedding.

    Attributes:
        modality: vLLM's name, ``image`` or ``video``.
        index: its index among the request's items of its modality, in prompt order.
        start: its first row in the tensor.
        end: one past its last row.
        offset: position of its placeholder in the prompt, in tokens.
        content_hash: vLLM's hash of the item and of how it was processed.
        layout: the place of each of its features, before any pooling. None for an item that was
            given as features, if nobody says what they stand for.
    """

    modality: str
    index: int
    start: int
    end: int
    offset: int
    content_hash: str
    layout: FeatureLayout | None = None


class MMEmbeddingInfo(msgspec.Struct, frozen=True):
    """The item that each row of an embedding belongs to: ``CompletionOutput.mm_embedding_info``.

    Attributes:
        items: those that are returned, in prompt order.
        pooling: as chosen.
        scales: float32 ``(rows,)``, what each int8 row is multiplied by, or with levels
            ``(rows, 1 + levels)``, for each level's columns; None for other dtypes.
        levels: of deepstack that each row has after its first ``hidden_size`` columns, which are
            what replaces a text embedding: ``hidden_size * (1 + levels)`` in all.
    """

    items: list[MMEmbeddingItem]
    pooling: str
    scales: torch.Tensor | None = None
    levels: int = 0


def item_sizes(
    choice: EmbeddingChoice,
    features: "Sequence[MultiModalFeatureSpec]",
    layout_of: Callable[[Any], FeatureLayout | None],
) -> list[ItemSize]:
    """Sizes of the items that a choice returns.

    Args:
        choice: of the request.
        features: its items.
        layout_of: a mapping's ``feature_layout``; asked where frames are counted. An item whose
            data are not at hand, as it was sent before, counts as one frame.
    """
    sizes = []
    for feature in features:
        if choice.wants(feature.modality):
            layout = layout_of(feature.data or {}) if choice.pooling == "frame" else None
            frames = 1 if layout is None else layout.frames
            sizes.append(ItemSize(feature.mm_position.get_num_embeds(), frames))
    return sizes


def assemble(
    parts: Sequence[torch.Tensor],
    features: Sequence[Any],
    layouts: Sequence[FeatureLayout | None],
    choice: EmbeddingChoice,
    hidden_size: int,
) -> tuple[torch.Tensor, MMEmbeddingInfo]:
    """Make the embedding of a request from its items' features.

    Args:
        parts: features of each item that is returned, ``(num_features, width)``, in prompt order.
        features: vLLM's ``MultiModalFeatureSpec`` of each.
        layouts: of each.
        choice: what the request wants.
        hidden_size: of the decoder.

    Returns:
        ``(rows, columns)``, contiguous memory of its own, and the item of each row.

    Raises:
        EmbeddingFault: the chosen dtype cannot hold its values, or it is larger than the request
            allows, which is known only here if a video's frames were not known before.
    """
    pooled = [
        pool(choose_levels(part, hidden_size, choice), layout, choice)
        for part, layout in zip(parts, layouts, strict=True)
    ]
    items, start, indices = [], 0, Counter[str]()
    for rows, feature, layout in zip(pooled, features, layouts, strict=True):
        items.append(
            MMEmbeddingItem(
                modality=feature.modality,
                index=indices[feature.modality],
                start=start,
                end=start + len(rows),
                offset=feature.mm_position.offset,
                content_hash=feature.mm_hash or feature.identifier,
                layout=layout,
            )
        )
        start += len(rows)
        indices[feature.modality] += 1
    dtype: str = choice.dtype
    if dtype == "auto" and choice.pooling != "raw":  # means are computed in fp32
        dtype = dtype_name(parts[0].dtype)
    levels = pooled[0].shape[1] // hidden_size - 1
    rows, scales = convert(torch.cat(pooled), dtype, levels)
    if choice.max_bytes is not None and rows.nbytes > choice.max_bytes:
        raise EmbeddingFault(
            f"the embedding has {len(rows)} rows and {rows.nbytes} bytes, more than the limit of "
            f"{choice.max_bytes}: choose another pooling or a smaller dtype"
        )
    return rows, MMEmbeddingInfo(items, choice.pooling, scales, levels)

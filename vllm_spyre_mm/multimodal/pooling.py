# SPDX-License-Identifier: Apache-2.0
"""What a choice makes of the features of one item: columns, rows or means, and the dtype."""

import torch
import torch.nn.functional as F

from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice
from vllm_spyre_mm.multimodal.feature_check import max_magnitude, overflows
from vllm_spyre_mm.multimodal.feature_layout import FeatureLayout


def pool(
    features: torch.Tensor, layout: FeatureLayout | None, choice: EmbeddingChoice
) -> torch.Tensor:
    """Select or pool the features of one image or video, as chosen.

    Args:
        features: ``(num_features, width)``.
        layout: of the item; None where it is not known and ``choice.needs_layout`` is false.
        choice: which rows.

    Returns:
        ``(rows, width)``: the features themselves if all are chosen; means are fp32.
    """
    if choice.pooling == "raw" and choice.newlines:
        return features
    if layout is None:
        return features.float().mean(dim=0, keepdim=True)
    if choice.pooling == "raw":
        return features[layout.places()]
    if choice.pooling == "image" or (choice.pooling == "frame" and layout.frames == 1):
        return features[layout.places()].float().mean(dim=0, keepdim=True)
    base = features[layout.base_places()].float()  # (frames, rows, columns, width)
    if choice.pooling == "frame":
        return base.mean(dim=(1, 2))
    if choice.pooling == "base":
        return base.mean(dim=(0, 1, 2)).unsqueeze(0)
    finest = base if layout.fine is None else features[layout.fine.indices()].float().unsqueeze(0)
    picture = finest.mean(dim=0).permute(2, 0, 1)
    return F.adaptive_avg_pool2d(picture, choice.grid).flatten(1).T


def choose_levels(
    features: torch.Tensor, hidden_size: int, choice: EmbeddingChoice
) -> torch.Tensor:
    """The columns that are chosen, as a view.

    Args:
        features: ``(num_features, hidden_size * (1 + levels))``.
        hidden_size: of the decoder.
        choice: which of them.
    """
    return features if choice.levels == "all" else features[:, :hidden_size]


class EmbeddingFault(ValueError):
    """An embedding cannot be returned as it was chosen; the message is for the client."""


class EmbeddingOverflowError(EmbeddingFault):
    """The chosen dtype cannot hold an embedding's values; the message names one that can."""


def convert(
    rows: torch.Tensor, dtype: str, levels: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Convert rows to the chosen dtype; also returns the scales of int8 rows.

    Args:
        rows: ``(rows, hidden_size * (1 + levels))``.
        dtype: of :class:`EmbeddingChoice`.
        levels: of deepstack that rows have.

    Returns:
        The rows, and for int8 fp32 scales: ``(rows,)``, or ``(rows, 1 + levels)`` if there are
        levels, whose magnitudes have nothing to do with each other.

    Raises:
        EmbeddingOverflowError: a value would become infinite.
    """
    if dtype == "auto":
        return rows, None
    if dtype != "int8":
        chosen: torch.dtype = getattr(torch, dtype)
        if overflows(rows, chosen):
            fits = "float32" if overflows(rows, torch.bfloat16) else "bfloat16"
            raise EmbeddingOverflowError(
                f"the embedding has values up to {max_magnitude(rows):.6g}, which {dtype} cannot "
                f"hold ({torch.finfo(chosen).max:.6g} at most): choose dtype {fits!r}"
            )
        return rows.to(chosen), None
    depths = rows.float().unflatten(1, (1 + levels, -1))
    scales = depths.abs().amax(dim=2) / 127
    divisors = torch.where(scales > 0, scales, 1.0).unsqueeze(2)
    small = (depths / divisors).round().to(torch.int8).flatten(1)
    return small, scales if levels else scales.squeeze(1)

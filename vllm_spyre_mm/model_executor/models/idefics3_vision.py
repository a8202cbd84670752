# SPDX-License-Identifier: Apache-2.0
"""The parts of Idefics 3 and SmolVLM: FMS's SigLIP with its final norm, and their connector."""

from collections.abc import Iterator
from typing import Any

import torch
from fms.models.siglip_vision import SiglipVision, SiglipVisionConfig
from torch import nn

from vllm_spyre_mm.model_executor.cpu.bidirectional import hidden_states


def build(config: SiglipVisionConfig) -> nn.Module:
    """FMS's SigLIP without the pooling head, which these models do not have."""
    tower: Any = SiglipVision(config)
    tower.head = nn.Identity()
    return tower


def states(tower: Any, pixel_values: torch.Tensor) -> Iterator[torch.Tensor]:
    """The embeddings and each layer's output in turn, the last one after the final norm.

    Args:
        tower: as :func:`build` makes it.
        pixel_values: ``(tiles, 3, image_size, image_size)``.

    Returns:
        ``(tiles, patches, hidden_size)`` each.
    """
    layers = tower.base_model.encoder.layers
    each = hidden_states(tower.base_model.embeddings(pixel_values), layers)
    for index, state in enumerate(each):
        yield tower.base_model.post_layernorm(state) if index == len(layers) else state


def buckets_are_positions(side: int) -> bool:
    """Whether each patch of a full tile has a position embedding of its own, in order.

    Transformers finds a patch's position by putting its row and its column, as fractions of the
    tile, into ``side`` buckets. With some numbers of patches the rounding of fp32 puts a row into
    the bucket before.

    Args:
        side: patches on the side of a tile.
    """
    fractions = (torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))).clamp(
        max=1.0 - 1e-6
    )
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    return torch.bucketize(fractions, boundaries, right=True).equal(torch.arange(side))


class PixelShuffleProjector(nn.Module):
    """Puts the patches of a square side by side and projects them linearly to one feature.

    Args:
        hidden_size: of the tower.
        width: of a feature.
        scale: patches on the side of a square.
    """

    def __init__(self, hidden_size: int, width: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.proj = nn.Linear(hidden_size * scale**2, width, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Make features.

        Args:
            patches: ``(tiles, side * side, hidden_size)``, row by row; ``side`` is a multiple of
                the scale.

        Returns:
            ``(tiles, (side / scale) ** 2, width)``, row by row.
        """
        tiles, positions, hidden_size = patches.shape
        squares = round(positions**0.5) // self.scale
        extents = (tiles, squares, self.scale, squares, self.scale, hidden_size)
        shuffled = patches.view(extents).permute(0, 1, 3, 2, 4, 5)
        return self.proj(shuffled.reshape(tiles, squares**2, -1))

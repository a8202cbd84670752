# SPDX-License-Identifier: Apache-2.0
"""Where the features of an image come from: which row stands for which place of the picture."""

import msgspec
import torch


class FeatureGrid(msgspec.Struct, frozen=True):
    """Features that cover an image evenly.

    The feature at a row and column of the grid is row ``start + row * stride + column`` of the
    image's features.

    Attributes:
        start: row of the features of its top left.
        rows: from top to bottom.
        columns: from left to right.
        stride: rows of the features from one row of the grid to the next.
    """

    start: int
    rows: int
    columns: int
    stride: int

    def indices(self) -> torch.Tensor:
        """int64 ``(rows, columns)``: rows of the image's features."""
        down = torch.arange(self.rows).unsqueeze(1) * self.stride
        return self.start + down + torch.arange(self.columns)


class FeatureLayout(msgspec.Struct, frozen=True):
    """Where the features of one image come from.

    Attributes:
        num_features: rows of the image, as merged.
        base: the grid of the base tile, the whole picture at the tower's resolution.
        fine: the grid of the tiles at a higher resolution, without what was padding; None for a
            picture that has none.
    """

    num_features: int
    base: FeatureGrid
    fine: FeatureGrid | None = None

    def places(self) -> torch.Tensor:
        """int64: the rows that stand for a place of the picture, in order."""
        grids = [self.base] if self.fine is None else [self.base, self.fine]
        return torch.cat([grid.indices().flatten() for grid in grids])

    def newlines(self) -> list[int]:
        """The rows that stand for none: learnt features that end a row of tiles."""
        return sorted(set(range(self.num_features)) - set(self.places().tolist()))

# SPDX-License-Identifier: Apache-2.0
"""The layout of an item's features: the place of the picture, or video, that each stands for."""

import msgspec
import torch


class FeatureGrid(msgspec.Struct, frozen=True):
    """A regular grid of features over an image.

    The feature at a row and column of the grid is row ``start + row * stride + column`` of the
    image's features. In a grid of tiles that formula holds within each tile, and the tiles follow
    one another row by row, ``tile * tile`` features each.

    Attributes:
        start: index of its top left feature.
        rows: number of rows, from top to bottom.
        columns: number of columns, from left to right.
        stride: distance of the grid's rows, or of a tile's, in features.
        tile: features on the side of a tile, which divides rows and columns; None for a grid whose
            features are not kept tile by tile.
    """

    start: int
    rows: int
    columns: int
    stride: int
    tile: int | None = None

    def indices(self) -> torch.Tensor:
        """int64 ``(rows, columns)``: rows of the image's features."""
        down, right = torch.arange(self.rows).unsqueeze(1), torch.arange(self.columns)
        if self.tile is None:
            return self.start + down * self.stride + right
        side = self.tile
        tiles = down // side * (self.columns // side) + right // side
        return self.start + tiles * side**2 + down % side * self.stride + right % side


class FeatureLayout(msgspec.Struct, frozen=True):
    """The grids that the features of one image or video form.

    Attributes:
        num_features: number of the item's features, as merged.
        base: the grid of the base tile, the whole picture at the tower's resolution; of a video
            that of its first frame.
        fine: the grid of the tiles at a higher resolution, without padding; None for a picture
            that has none, and for a video.
        frames: of a video, as the tower merges them: a tower may make one of two frames. Their
            features follow one another, as many for each; a newline feature may stand behind the
            last. 1 for an image.
    """

    num_features: int
    base: FeatureGrid
    fine: FeatureGrid | None = None
    frames: int = 1

    @property
    def frame_stride(self) -> int:
        """Distance between the first features of two frames, in features."""
        return self.num_features // self.frames

    def base_places(self) -> torch.Tensor:
        """Indices of the features of the base grid of each frame.

        Returns:
            int64 ``(frames, rows, columns)``.
        """
        starts = torch.arange(self.frames) * self.frame_stride
        return starts.view(-1, 1, 1) + self.base.indices()

    def places(self) -> torch.Tensor:
        """Indices (int64) of the features that stand for a place of the picture, ascending."""
        places = [self.base_places().flatten()]
        if self.fine is not None:
            places.append(self.fine.indices().flatten())
        return torch.cat(places).sort().values

    def newlines(self) -> list[int]:
        """Indices of the newline features: learnt features that end a row of tiles."""
        return sorted(set(range(self.num_features)) - set(self.places().tolist()))

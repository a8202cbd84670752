# SPDX-License-Identifier: Apache-2.0
"""Where the patches of frames are: their order in a tower, their positions and their segments.

A processor gives the patches of a frame square by square, where the patches of a square become one
feature. Windows change the order of the squares. All is computed on the host, once for a batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_spyre_mm.model_executor.models.qwen_vision_config import QwenVisionConfig

FrameSize = tuple[int, int]
"""Rows and columns of patches."""


@dataclass(frozen=True, slots=True)
class FrameLayout:
    """The patches of a frame, in the order of the tower.

    Attributes:
        rows: int64 ``(patches,)``, of each patch.
        columns: likewise.
        squares: int64 ``(features,)``, index of each square in the processor's order.
        windows: int64 ``(windows,)``, patches of each window.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    squares: torch.Tensor
    windows: torch.Tensor


def frame_layout(size: FrameSize, merge: int, window: int) -> FrameLayout:
    """Lay out a frame.

    Args:
        size: of the frame, whole squares.
        merge: patches on the side of a square.
        window: squares on the side of a window; 0 for one window that is the frame.
    """
    down, across = (side // merge for side in size)
    squares = torch.arange(down * across)
    rows, columns = squares // across, squares % across
    windows = torch.zeros_like(squares)
    if window:
        windows = rows // window * math.ceil(across / window) + columns // window
        squares = windows.argsort(stable=True)
    inside = torch.arange(merge)
    shape = (len(squares), merge, merge)
    return FrameLayout(
        (rows[squares].view(-1, 1, 1) * merge + inside.view(-1, 1)).expand(shape).flatten(),
        (columns[squares].view(-1, 1, 1) * merge + inside).expand(shape).flatten(),
        squares,
        windows.bincount() * merge**2,
    )


class BatchLayout:
    """The layout of frames one after the other.

    Args:
        sizes: of the frames.
        config: of the tower.
    """

    def __init__(self, sizes: Sequence[FrameSize], config: QwenVisionConfig) -> None:
        self._config = config
        self.sizes = sizes
        self.layouts = {
            size: frame_layout(size, config.spatial_merge_size, config.window)
            for size in dict.fromkeys(sizes)
        }
        self._frames = [self.layouts[size] for size in sizes]

    def rope_table(self) -> torch.Tensor:
        """fp32 ``(patches, head_dim)``: cosine and sine of each pair, first those of the row."""
        quarter = self._config.head_dim // 4
        frequencies = 1.0 / self._config.rope_theta ** (torch.arange(quarter) / quarter)
        longest = max(max(size) for size in self.sizes)
        angles = torch.outer(torch.arange(longest).float(), frequencies)
        pairs = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)
        tables = {
            size: torch.cat([pairs[layout.rows], pairs[layout.columns]], dim=1)
            for size, layout in self.layouts.items()
        }
        return torch.cat([tables[size] for size in self.sizes])

    @cached_property
    def frame_segments(self) -> torch.Tensor:
        """int32 ``(frames + 1,)``: where each frame begins, and where the last one ends."""
        return _bounds(torch.tensor([height * width for height, width in self.sizes]))

    @cached_property
    def window_segments(self) -> torch.Tensor:
        """int32 ``(windows + 1,)``: the same of the windows."""
        return _bounds(torch.cat([frame.windows for frame in self._frames]))

    def square_order(self) -> torch.Tensor:
        """int64 ``(features,)``: index of each square in the processor's order of all frames."""
        orders, first = [], 0
        for frame in self._frames:
            orders.append(frame.squares + first)
            first += len(frame.squares)
        return torch.cat(orders)

    def learnt_positions(self, grid: torch.Tensor) -> torch.Tensor:
        """Interpolate learnt positions.

        Args:
            grid: ``(cells, width)``, of a square with the same corners as each frame.

        Returns:
            fp32 ``(patches, width)``.
        """
        side = math.isqrt(len(grid))
        cells = grid.float().view(side, side, -1)
        positions = {}
        for (height, width), layout in self.layouts.items():
            rows, columns = (_neighbours(length, side) for length in (height, width))
            low, high, weights = rows
            cells_of_rows = torch.lerp(cells[low], cells[high], weights[:, None, None])
            low, high, weights = columns
            whole = torch.lerp(cells_of_rows[:, low], cells_of_rows[:, high], weights[:, None])
            positions[height, width] = whole[layout.rows, layout.columns]
        return torch.cat([positions[size] for size in self.sizes])


def batches(sizes: Sequence[FrameSize], most: int) -> Iterator[list[FrameSize]]:
    """Cut frames into batches of at most ``most`` patches; a larger frame is alone in its own."""
    batch: list[FrameSize] = []
    patches = 0
    for height, width in sizes:
        if batch and patches + height * width > most:
            yield batch
            batch, patches = [], 0
        batch.append((height, width))
        patches += height * width
    if batch:
        yield batch


def _bounds(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()


def _neighbours(length: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two cells of a side beside each of ``length`` places, and the weight of the second."""
    places = torch.arange(length).float() * (side - 1) / max(length - 1, 1)
    low = places.long()
    return low, (low + 1).clamp(max=side - 1), places - low

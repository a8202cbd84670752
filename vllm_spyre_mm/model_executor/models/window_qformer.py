# SPDX-License-Identifier: Apache-2.0
"""Windowed Q-Formers: projectors that shorten a tile's patches window by window.

In each window of patches a few queries, which are the window's own patches at a lower resolution
plus learnt ones, attend to each other and to all patches of the window (a Q-Former as in BLIP-2).
Several of these make the levels of one feature, from several hidden states of the vision tower.

They are not compiled: nine tenths of their time are linear layers and attention, which are kernels
as they are, and so nothing is traced for another number of tiles.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fms.modules.feedforward import FeedForwardBlock
from torch import nn

from vllm_spyre_mm.model_executor.pieces import Pieces, whole

SHRINK = 2
"""Patches on the side of the square that becomes one feature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowQFormerConfig:
    """The sizes of windowed Q-Formers.

    Attributes:
        hidden_size: of the vision tower and of the Q-Former.
        nheads: of its attention.
        intermediate_size: of its feed-forward layers.
        nlayers: layers of a Q-Former, each with attention to the patches.
        norm_eps: epsilon of its norms.
        out_features: width of a feature's level.
        side: patches on the side of a tile; a multiple of ``window``.
        window: patches on the side of a window; even.
    """

    hidden_size: int
    nheads: int
    intermediate_size: int
    nlayers: int
    norm_eps: float
    out_features: int
    side: int
    window: int


@dataclass(frozen=True, slots=True)
class Level:
    """Where the rows of one level come from.

    Attributes:
        state: index of the hidden state among those that the projector is given.
        corner: which patch of a square of two by two, row by row, starts a query; None: their mean.
    """

    state: int
    corner: int | None = None


class WindowAttention(nn.Module):
    """Attention of a window's queries, with what is around it: a residual and the norm after it."""

    def __init__(self, config: WindowQFormerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.nheads = config.nheads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)

    def forward(self, queries: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """``(windows, queries, hidden_size)``, of these and ``(windows, keys, hidden_size)``."""
        heads = (
            each.unflatten(-1, (self.nheads, -1)).transpose(1, 2)
            for each in (self.query(queries), self.key(context), self.value(context))
        )
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.norm(queries + self.dense(attended))


class QFormerLayer(nn.Module):
    """Attention of the queries to each other, then to the patches, and a feed-forward layer."""

    def __init__(self, config: WindowQFormerConfig) -> None:
        super().__init__()
        self.attention = WindowAttention(config)
        self.crossattention = WindowAttention(config)
        self.feed_forward = FeedForwardBlock(
            config.hidden_size,
            hidden_grow_factor=config.intermediate_size / config.hidden_size,
            activation_fn=nn.GELU(),
            p_dropout=0.0,
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, queries: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """``(windows, queries, hidden_size)``, of these and ``(windows, patches, hidden_size)``."""
        attended = self.attention(queries, queries)
        attended = self.crossattention(attended, patches)
        return self.norm(attended + self.feed_forward(attended))


class WindowQFormer(nn.Module):
    """The projector of one level.

    Args:
        config: the sizes.
        corner: as in :class:`Level`.
    """

    def __init__(self, config: WindowQFormerConfig, corner: int | None) -> None:
        super().__init__()
        width = config.hidden_size
        self.corner = corner
        self.window, self.few = config.window, config.window // SHRINK
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.query = nn.Parameter(torch.empty(1, self.few**2, width))
        self.image_positions = nn.Parameter(torch.empty(1, self.window**2, width))
        self.layernorm = nn.LayerNorm(width, eps=config.norm_eps)
        self.layers = nn.ModuleList(QFormerLayer(config) for _ in range(config.nlayers))
        self.out_linear = nn.Linear(width, config.out_features)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Rows ``(windows, queries, out_features)`` of ``(windows, patches, hidden_size)``."""
        windows = self.norm(windows)
        queries = self.layernorm(self.query + self._shrink(windows))
        patches = windows + self.image_positions
        for layer in self.layers:
            queries = layer(queries=queries, patches=patches)
        return self.out_linear(queries)

    def _shrink(self, windows: torch.Tensor) -> torch.Tensor:
        """The start of each query, ``(windows, queries, hidden_size)``."""
        squares = windows.unflatten(1, (self.few, SHRINK, self.few, SHRINK))
        corners = [squares[:, :, i, :, j] for i in range(SHRINK) for j in range(SHRINK)]
        if self.corner is not None:
            return corners[self.corner].flatten(1, 2)
        # One after the other: PyTorch's mean over several axes of bf16 takes 60 times as long.
        total = sum((corner.float() for corner in corners), start=torch.zeros(()))
        return (total / len(corners)).to(windows.dtype).flatten(1, 2)


class LevelProjector(nn.Module):
    """All levels of a tile's features.

    Args:
        config: the sizes.
        levels: in the order of the columns.
    """

    def __init__(self, config: WindowQFormerConfig, levels: tuple[Level, ...]) -> None:
        super().__init__()
        self.hidden_size, self.window = config.hidden_size, config.window
        self.across = config.side // config.window
        self.states = tuple(level.state for level in levels)
        self.levels = nn.ModuleList(WindowQFormer(config, level.corner) for level in levels)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """All levels at once; see :meth:`pieces`."""
        return whole(self.pieces(states))

    def pieces(self, states: torch.Tensor) -> Pieces[torch.Tensor]:
        """Features of tiles; yields after each level.

        Args:
            states: ``(tiles, patches, states * hidden_size)``, the tower's hidden states side by
                side, patches row by row.

        Returns:
            ``(tiles, features, levels * out_features)``, row by row.
        """
        windows = [self._windows(state) for state in states.split(self.hidden_size, dim=-1)]
        columns = []
        for level, state in zip(self.levels, self.states, strict=True):
            columns.append(level(windows[state]))
            yield
        few = self.window // SHRINK
        grid = torch.cat(columns, dim=-1).unflatten(0, (-1, self.across, self.across))
        return grid.unflatten(3, (few, few)).transpose(2, 3).flatten(1, 4)

    def _windows(self, state: torch.Tensor) -> torch.Tensor:
        """``(tiles * windows, patches, hidden_size)`` of one hidden state of all tiles."""
        grid = state.unflatten(1, (self.across, self.window, self.across, self.window))
        return grid.transpose(2, 3).flatten(3, 4).flatten(0, 2)

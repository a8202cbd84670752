# SPDX-License-Identifier: Apache-2.0
"""Draws image features as colours over the picture that they come from."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw

from vllm_spyre_mm.multimodal.feature_layout import FeatureGrid, FeatureLayout

COLOUR_SHARE = 0.6
"""Opacity of the colours over the picture, 0 to 1."""

PANEL_HEIGHT = 384
"""Height of each panel of a figure in pixels."""

CAPTION_HEIGHT = 24
"""Height of the line of text above the panels in pixels."""

Panel = tuple[str, Image.Image]
"""A caption and a picture."""


def pca_colours(features: torch.Tensor) -> torch.Tensor:
    """Map features to colours: their first three principal components as red, green and blue.

    Args:
        features: ``(num_features, hidden_size)``, any floating-point dtype.

    Returns:
        uint8 ``(num_features, 3)``. Each component is scaled to the whole range by itself, and
        its sign is fixed, so that the same features always have the same colours.
    """
    centred = features.float() - features.float().mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:3]
    strongest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    projected = centred @ (directions * strongest.sign()).T
    low, high = projected.amin(dim=0), projected.amax(dim=0)
    levels = (projected - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    missing = 3 - levels.shape[1]  # fewer features, or a narrower model, than there are colours
    return torch.nn.functional.pad((levels * 255).round(), (0, missing)).to(torch.uint8)


def heat(similarities: torch.Tensor) -> torch.Tensor:
    """Map cosine similarities to colours: blue at -1, white at 0, red at 1.

    Args:
        similarities: ``(n,)``.

    Returns:
        uint8 ``(n, 3)``.
    """
    values = similarities.float().clamp(-1, 1).unsqueeze(1)
    towards = torch.where(values > 0, torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0]))
    white = torch.ones(3)
    return ((white + values.abs() * (towards - white)) * 255).round().to(torch.uint8)


def similarity_to(features: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of each row of ``(n, hidden_size)`` to a vector ``(hidden_size,)``."""
    return torch.nn.functional.cosine_similarity(features.float(), chosen.float(), dim=-1)


def colour_maps(colours: torch.Tensor, layout: FeatureLayout, frame: int = 0) -> list[Image.Image]:
    """One small picture for each grid, a pixel for each feature; newline features are left out.

    Args:
        colours: uint8 ``(num_features, 3)`` of one image or video.
        layout: of it.
        frame: of the video.

    Raises:
        ValueError: the layout has another number of features.
    """
    if len(colours) != layout.num_features:
        raise ValueError(f"{len(colours)} features do not fill {layout}")
    places = [layout.base_places()[frame]]
    if layout.fine is not None:
        places.append(layout.fine.indices())
    return [Image.fromarray(colours[each].numpy()) for each in places]


def place_colours(features: torch.Tensor, layout: FeatureLayout) -> torch.Tensor:
    """Colours of the features of one item, uint8 ``(num_features, 3)``; black for newlines,
    which would otherwise take the colours' range."""
    colours = torch.zeros(len(features), 3, dtype=torch.uint8)
    colours[layout.places()] = pca_colours(features[layout.places()])
    return colours


def laid_over(
    picture: Image.Image, colours: torch.Tensor, layout: FeatureLayout, frame: int = 0
) -> list[Panel]:
    """A panel for each grid: its colours blended over the picture, or over a frame of a video."""
    plain = _panel(picture)
    panels, maps = [], colour_maps(colours, layout, frame)
    for name, small in zip(("base grid", "fine grid"), maps, strict=False):
        large = small.resize(plain.size, Image.Resampling.NEAREST)
        caption = f"{name}, {small.height} x {small.width} features"
        panels.append((caption, Image.blend(plain, large, COLOUR_SHARE)))
    return panels


def plain(picture: Image.Image, caption: str) -> Panel:
    """The picture as it is."""
    return caption, _panel(picture)


def tiles(picture: Image.Image, grid: tuple[int, int], layout: FeatureLayout) -> Panel:
    """The picture with the borders of its tiles.

    Args:
        picture: any.
        grid: rows and columns of tiles; the picture lies in their middle, padded to fill them.
        layout: of the picture; a tile has as many features as the base tile.
    """
    panel = _panel(picture).copy()
    draw = ImageDraw.Draw(panel)
    fine = layout.fine or layout.base
    for y in _borders(grid[0], layout.base.rows, fine.rows, panel.height):
        draw.line([(0, y), (panel.width, y)], fill="magenta", width=2)
    for x in _borders(grid[1], layout.base.columns, fine.columns, panel.width):
        draw.line([(x, 0), (x, panel.height)], fill="magenta", width=2)
    return f"{grid[0]} x {grid[1]} tiles", panel


def _borders(num_tiles: int, of_a_tile: int, kept: int, extent: int) -> list[int]:
    """Where tiles meet, in pixels of an extent that shows the kept features of a direction."""
    padding = (num_tiles * of_a_tile - kept) / 2
    borders = (round((i * of_a_tile - padding) * extent / kept) for i in range(1, num_tiles))
    return [border for border in borders if 0 < border < extent]


def marked(panel: Panel, grid: FeatureGrid, row: int, column: int) -> Panel:
    """A panel with a frame around one place of a grid."""
    caption, picture = panel[0], panel[1].copy()
    width, height = picture.width / grid.columns, picture.height / grid.rows
    box = [column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1]
    ImageDraw.Draw(picture).rectangle(box, outline="black", width=3)
    return caption, picture


def figure(rows: Sequence[Sequence[Panel]]) -> Image.Image:
    """Panels in rows, a line of text above each."""
    height = CAPTION_HEIGHT + PANEL_HEIGHT
    width = max(sum(panel.width for _, panel in row) for row in rows)
    canvas = Image.new("RGB", (width, len(rows) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        x = 0
        for caption, panel in row:
            canvas.paste(panel, (x, i * height + CAPTION_HEIGHT))
            draw.text((x + 4, i * height + 6), caption, fill="black")
            x += panel.width
    return canvas


def pca_figure(picture: Image.Image, features: torch.Tensor, layout: FeatureLayout) -> Image.Image:
    """A picture beside its features as principal components, each grid laid over the picture."""
    colours = place_colours(features, layout)
    return figure([[plain(picture, "the picture"), *laid_over(picture, colours, layout)]])


def _panel(picture: Image.Image) -> Image.Image:
    size = (max(1, round(picture.width * PANEL_HEIGHT / picture.height)), PANEL_HEIGHT)
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)

# SPDX-License-Identifier: Apache-2.0
"""Shows the features of an image as colours, laid over the places that they come from.

LLaVA-Next gives an image two grids of features: the *base* grid, which covers the whole picture,
and the *fine* grid of the tiles at a higher resolution, which covers it again. The colours are the
first three principal components of the features of both.
"""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw

COLOUR_SHARE = 0.6
"""Share of the colours where they are laid over the picture; the rest is the picture."""

PANEL_HEIGHT = 384
"""Height of each panel of the figure in pixels."""

CAPTION_HEIGHT = 24
"""Height of the line of text above the panels in pixels."""


@dataclass(frozen=True, slots=True)
class FeatureGrids:
    """How the features of one image are laid out, in rows and columns of features.

    Attributes:
        base: rows and columns of the base grid, whose features come first.
        fine: rows and columns of the fine grid, whose features follow row by row with a *newline*
            feature after each row. A picture that is very narrow leaves no rows in the grid of
            tiles, or no columns.
    """

    base: tuple[int, int]
    fine: tuple[int, int]

    @property
    def num_features(self) -> int:
        """Features of the image, newline features included."""
        return self.base[0] * self.base[1] + self.fine[0] * (self.fine[1] + 1)


def feature_grids(hf_config: Any, size: tuple[int, int]) -> FeatureGrids:
    """The grids of an image.

    Args:
        hf_config: the Transformers configuration of a LLaVA-Next model.
        size: width and height of the picture in pixels.
    """
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    width, height = size
    vision = hf_config.vision_config
    side = vision.image_size // vision.patch_size
    resolution = select_best_resolution((height, width), hf_config.image_grid_pinpoints)
    tiles = torch.empty(1, *(extent // vision.patch_size for extent in resolution), device="meta")
    _, rows, columns = unpad_image(tiles, (height, width)).shape
    return FeatureGrids((side, side), (rows, columns))


def pca_colours(features: torch.Tensor) -> torch.Tensor:
    """Colours of feature vectors: their first three principal components as red, green and blue.

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


def colour_maps(features: torch.Tensor, grids: FeatureGrids) -> list[Image.Image]:
    """One small picture for each grid, a pixel for each feature; newline features are left out.

    Args:
        features: ``(num_features, hidden_size)`` of one image.
        grids: of that image.

    Raises:
        ValueError: the grids have another number of features.
    """
    if len(features) != grids.num_features:
        raise ValueError(f"{len(features)} features do not fill {grids}")
    num_base = grids.base[0] * grids.base[1]
    rows, columns = grids.fine
    fine = features[num_base:].view(rows, columns + 1, features.shape[1])[:, :columns].flatten(0, 1)
    colours = pca_colours(torch.cat([features[:num_base], fine]))
    maps = [_as_picture(colours[:num_base], grids.base)]
    if rows and columns:
        maps.append(_as_picture(colours[num_base:], grids.fine))
    return maps


def _as_picture(colours: torch.Tensor, shape: tuple[int, int]) -> Image.Image:
    return Image.fromarray(colours.view(*shape, 3).numpy())


def figure(picture: Image.Image, features: torch.Tensor, grids: FeatureGrids) -> Image.Image:
    """A picture beside its colour maps, each laid over the picture, with a line of text above."""
    size = (max(1, round(picture.width * PANEL_HEIGHT / picture.height)), PANEL_HEIGHT)
    plain = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    panels = [("the picture", plain)]
    names = ("base grid", "fine grid")
    for name, colours in zip(names, colour_maps(features, grids), strict=False):
        laid_over = Image.blend(plain, colours.resize(size, Image.Resampling.NEAREST), COLOUR_SHARE)
        panels.append((f"{name}, {colours.height} x {colours.width} features", laid_over))
    canvas = Image.new("RGB", (len(panels) * size[0], CAPTION_HEIGHT + size[1]), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (caption, panel) in enumerate(panels):
        canvas.paste(panel, (i * size[0], CAPTION_HEIGHT))
        draw.text((i * size[0] + 4, 6), caption, fill="black")
    return canvas

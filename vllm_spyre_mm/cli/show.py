# SPDX-License-Identifier: Apache-2.0
"""``vllm-spyre-mm show``: features as colours, or cosine similarities of two pictures' places."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from vllm_spyre_mm.multimodal.coloring import Panel
    from vllm_spyre_mm.multimodal.feature_layout import FeatureGrid, FeatureLayout

SUMMARY = "draw a picture, its tiles and its features as a PNG"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("picture", type=Path)
    parser.add_argument(
        "other",
        type=Path,
        nargs="?",
        help="a second picture: show the cosine similarity of one place to every place of both",
    )
    parser.add_argument(
        "--place",
        type=int,
        nargs=2,
        metavar=("ROW", "COLUMN"),
        help="of the first picture's finest grid, from the top left (default: its middle)",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("features.png"))
    parser.add_argument("--model", help="folder or hub name (default: the embedded checkpoint)")
    parser.add_argument("--revision", help="of a hub model")


def run(arguments: argparse.Namespace) -> int:
    """Draw; the exit status is 1 where a picture cannot be encoded or the place is not in it."""
    from vllm_spyre_mm.cli.encoder import VisionEncoder, read_picture
    from vllm_spyre_mm.demo import checkpoint_path
    from vllm_spyre_mm.multimodal.coloring import figure
    from vllm_spyre_mm.multimodal.feature_check import FeatureError

    paths = [path for path in (arguments.picture, arguments.other) if path is not None]
    try:
        pictures = [read_picture(path) for path in paths]
    except (OSError, ValueError) as error:
        print(f"the picture cannot be read: {error}", file=sys.stderr)
        return 1
    model = arguments.model or str(checkpoint_path())
    try:
        encoder = VisionEncoder(model, backend="eager", revision=arguments.revision)
    except (OSError, ValueError) as error:
        print(f"{model} cannot be loaded: {error}", file=sys.stderr)
        return 1
    try:
        encoded = [encode_picture(encoder, picture) for picture in pictures]
    except FeatureError as error:
        print(f"the picture was encoded to {error}", file=sys.stderr)
        return 1
    if len(encoded) == 1:
        rows = [encoded[0].principal_components()]
    else:
        grid = encoded[0].finest
        row, column = arguments.place or (grid.rows // 2, grid.columns // 2)
        if not (0 <= row < grid.rows and 0 <= column < grid.columns):
            print(f"the grid has {grid.rows} rows and {grid.columns} columns", file=sys.stderr)
            return 1
        rows = similarities(encoded, row, column)
    figure(rows).save(arguments.output)
    print(arguments.output.resolve())
    return 0


class EncodedPicture:
    """A picture with its features.

    Args:
        picture: as it was encoded.
        features: ``(num_features, hidden_size)``.
        layout: of the features.
        tiles: rows and columns of its tiles, None for a model without tiles.
    """

    def __init__(
        self,
        picture: "Image.Image",
        features: "torch.Tensor",
        layout: "FeatureLayout",
        tiles: tuple[int, int] | None,
    ) -> None:
        self.picture, self.features, self.layout, self.tiles = picture, features, layout, tiles

    @property
    def finest(self) -> "FeatureGrid":
        """The grid with the most detail."""
        return self.layout.fine or self.layout.base

    def principal_components(self) -> "list[Panel]":
        """The picture with its tiles, and its features over it."""
        from vllm_spyre_mm.multimodal.coloring import laid_over, place_colours, tiles

        colours = place_colours(self.features, self.layout)
        return [
            tiles(self.picture, self.tiles or (1, 1), self.layout),
            *laid_over(self.picture, colours, self.layout),
        ]


def encode_picture(encoder: object, picture: "Image.Image") -> EncodedPicture:
    """Encode a picture with a :class:`~vllm_spyre_mm.cli.encoder.VisionEncoder`."""
    from vllm_spyre_mm.cli.encoder import VisionEncoder
    from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice

    assert isinstance(encoder, VisionEncoder)
    processed = encoder.process(picture)
    (features,) = encoder.encode([processed], EmbeddingChoice())
    layout = encoder.mapping.feature_layout(processed.item)
    assert layout is not None, "a picture has a layout"
    return EncodedPicture(picture, features, layout, encoder.mapping.tile_grid(processed.item))


def similarities(encoded: list[EncodedPicture], row: int, column: int) -> "list[list[Panel]]":
    """Panels of the cosine similarity of every place of both pictures to one place of the first."""
    from vllm_spyre_mm.multimodal.coloring import heat, laid_over, marked, similarity_to

    first = encoded[0]
    chosen = first.features[first.finest.indices()[row, column]]
    rows = []
    for each in encoded:
        colours = heat(similarity_to(each.features, chosen))
        panels = laid_over(each.picture, colours, each.layout)
        if each is first:
            panels[-1] = marked(panels[-1], first.finest, row, column)
        rows.append(panels)
    return rows

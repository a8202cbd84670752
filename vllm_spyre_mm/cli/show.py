# SPDX-License-Identifier: Apache-2.0
"""``vllm-spyre-mm show``: features as colours, or cosine similarities of two pictures' places."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from vllm_spyre_mm.cli.encoder import VisionEncoder
    from vllm_spyre_mm.cli.media import Item
    from vllm_spyre_mm.multimodal.coloring import Panel
    from vllm_spyre_mm.multimodal.feature_layout import FeatureGrid, FeatureLayout

SUMMARY = "draw a picture or a video and its features as a PNG"

MAX_FRAMES = 8
"""Frames of a video that are drawn, evenly spaced."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("picture", type=Path, help="a picture, or a video if the model takes some")
    parser.add_argument(
        "other",
        type=Path,
        nargs="?",
        help="a second one: show the cosine similarity of one place to every place of both",
    )
    parser.add_argument(
        "--place",
        type=int,
        nargs=2,
        metavar=("ROW", "COLUMN"),
        help="of the first one's finest grid, from the top left (default: its middle); of a "
        "video in its first frame",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("features.png"))
    parser.add_argument("--model", help="folder or hub name (default: the embedded checkpoint)")
    parser.add_argument("--revision", help="of a hub model")


def run(arguments: argparse.Namespace) -> int:
    """Draw; the exit status is 1 where a picture cannot be encoded or the place is not in it."""
    from vllm_spyre_mm.cli.encoder import VisionEncoder
    from vllm_spyre_mm.demo import checkpoint_path
    from vllm_spyre_mm.multimodal.coloring import figure
    from vllm_spyre_mm.multimodal.feature_check import FeatureError

    model = arguments.model or str(checkpoint_path())
    try:
        encoder = VisionEncoder(model, backend="eager", revision=arguments.revision)
    except (OSError, ValueError) as error:
        print(f"{model} cannot be loaded: {error}", file=sys.stderr)
        return 1
    paths = [path for path in (arguments.picture, arguments.other) if path is not None]
    try:
        items = [encoder.read(path) for path in paths]
    except (OSError, ValueError) as error:
        print(f"the picture cannot be read: {error}", file=sys.stderr)
        return 1
    try:
        encoded = [encode_item(encoder, item) for item in items]
    except FeatureError as error:
        print(f"the picture was encoded to {error}", file=sys.stderr)
        return 1
    if len(encoded) == 1:
        rows = encoded[0].principal_components()
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


class EncodedItem:
    """A picture or a video with its features.

    Args:
        given: as it was encoded.
        features: ``(num_features, hidden_size)``.
        layout: of the features.
        tiles: rows and columns of a picture's tiles, None for a model without tiles.
    """

    def __init__(
        self,
        given: "Item",
        features: "torch.Tensor",
        layout: "FeatureLayout",
        tiles: tuple[int, int] | None,
    ) -> None:
        self.given, self.features, self.layout, self.tiles = given, features, layout, tiles

    @property
    def finest(self) -> "FeatureGrid":
        """The grid with the most detail; of a video that of its first frame."""
        return self.layout.fine or self.layout.base

    def principal_components(self) -> "list[list[Panel]]":
        """The picture with its tiles, or frames of the video, each with its features over it."""
        from vllm_spyre_mm.multimodal.coloring import place_colours, plain, tiles

        rows = self.laid_over(place_colours(self.features, self.layout))
        if not isinstance(self.given, tuple):
            return [[tiles(self.given, self.tiles or (1, 1), self.layout), *rows[0]]]
        count = self.layout.frames
        captions = [f"frame {frame + 1} of {count}" for frame, _ in self.shown()]
        return [
            [plain(picture, caption), *row]
            for row, caption, (_, picture) in zip(rows, captions, self.shown(), strict=True)
        ]

    def laid_over(self, colours: "torch.Tensor") -> "list[list[Panel]]":
        """Colours of the features over the picture, or over frames of the video, a row for each."""
        from vllm_spyre_mm.multimodal.coloring import laid_over

        return [laid_over(each, colours, self.layout, frame) for frame, each in self.shown()]

    def shown(self) -> "list[tuple[int, Image.Image]]":
        """The picture, or up to :data:`MAX_FRAMES` frames of the video with their numbers.

        A tower that makes one frame of several counts that one, which the first of them stands for.
        """
        from PIL import Image

        if not isinstance(self.given, tuple):
            return [(0, self.given)]
        frames, count = self.given[0], self.layout.frames
        shown = min(count, MAX_FRAMES)
        numbers = [number * count // shown for number in range(shown)]
        return [
            (number, Image.fromarray(frames[number * len(frames) // count])) for number in numbers
        ]


def encode_item(encoder: "VisionEncoder", given: "Item") -> EncodedItem:
    """Encode a picture or a video; of features with levels the columns of the input are taken."""
    from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice

    processed = encoder.process(given)
    (features,) = encoder.encode([processed], EmbeddingChoice(levels="input"))
    layout = encoder.mapping.feature_layout(processed.item)
    assert layout is not None, "what was encoded has a layout"
    return EncodedItem(given, features, layout, encoder.mapping.tile_grid(processed.item))


def similarities(encoded: list[EncodedItem], row: int, column: int) -> "list[list[Panel]]":
    """Panels of the cosine similarity of every place of both to one place of the first."""
    from vllm_spyre_mm.multimodal.coloring import heat, marked, similarity_to

    first = encoded[0]
    chosen = first.features[first.finest.indices()[row, column]]
    rows = []
    for each in encoded:
        rows += each.laid_over(heat(similarity_to(each.features, chosen)))
    rows[0][-1] = marked(rows[0][-1], first.finest, row, column)
    return rows

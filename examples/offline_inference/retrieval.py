# SPDX-License-Identifier: Apache-2.0
"""Finds the pictures of a folder that are most like a question picture, by their features.

Run it with ``python retrieval.py``: it draws a folder of pictures, encodes each once without the
decoder, and looks up pictures that are not among them.
"""

import random
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from vllm_spyre_mm.cli.encoder import VisionEncoder
from vllm_spyre_mm.cli.media import read_picture
from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.demo.pictures import PLACES, Shape, draw_picture
from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice

COLOURS = ("red", "green", "blue", "yellow")
KINDS = ("circle", "square")


def draw_folder(folder: Path) -> None:
    """A picture for each kind, colour and place, named after what is on it."""
    rng = random.Random(0)
    for kind in KINDS:
        for colour in COLOURS:
            for place in PLACES:
                picture = draw_picture([Shape(kind, colour, place)], (120, 120), rng=rng)
                picture.image.save(folder / f"{colour} {kind}, {place}.png")


def embed(encoder: VisionEncoder, pictures: list[Image.Image]) -> torch.Tensor:
    """Means over the quarters of each picture, ``(pictures, 4 * hidden_size)``."""
    choice = EmbeddingChoice(pooling="grid", grid=(2, 2), dtype="float32")
    items = [encoder.process(picture) for picture in pictures]
    return torch.stack(encoder.encode(items, choice)).flatten(1)


def main() -> None:
    """Draw, encode and look up."""
    encoder = VisionEncoder(str(checkpoint_path()), backend="eager")
    with tempfile.TemporaryDirectory() as name:
        draw_folder(Path(name))
        files = sorted(Path(name).glob("*.png"))
        features = embed(encoder, [read_picture(file) for file in files])
    mean = features.mean(dim=0)  # what all pictures share says nothing
    index = F.normalize(features - mean, dim=1)

    rng = random.Random(1)
    for kind, colour, place in (
        ("circle", "red", "top left"),
        ("square", "blue", "bottom right"),
        ("circle", "yellow", "top right"),
    ):
        asked = draw_picture([Shape(kind, colour, place)], (140, 120), rng=rng).image
        similarity = index @ F.normalize(embed(encoder, [asked])[0] - mean, dim=0)
        best = similarity.topk(3)
        found = "; ".join(
            f"{files[i].stem} ({value:.3f})"
            for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        print(f"{colour} {kind}, {place}: {found}")


if __name__ == "__main__":
    main()

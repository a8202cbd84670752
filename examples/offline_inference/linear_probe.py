# SPDX-License-Identifier: Apache-2.0
"""Reads the colour of a shape from pooled features, with one linear layer.

Run it with ``python linear_probe.py``.
"""

import random

import torch

from vllm_spyre_mm.cli.encoder import VisionEncoder
from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.demo.pictures import COLOURS, KINDS, PLACES, Shape, draw_picture
from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice

NAMES = list(COLOURS)


def dataset(encoder: VisionEncoder, seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``(count, hidden_size)`` of pictures with one shape, and which colour it has."""
    rng = random.Random(seed)
    features, colours = [], []
    choice = EmbeddingChoice(pooling="image", dtype="float32")
    for _ in range(count):
        colour = rng.randrange(len(NAMES))
        shape = Shape(rng.choice(list(KINDS)), NAMES[colour], rng.choice(list(PLACES)))
        picture = draw_picture([shape], (96, 96), rng=rng).image
        features += encoder.encode([encoder.process(picture)], choice)
        colours.append(colour)
    return torch.cat(features), torch.tensor(colours)


def main() -> None:
    """Fit on some pictures, examine on others."""
    encoder = VisionEncoder(str(checkpoint_path()), backend="eager")
    features, colours = dataset(encoder, seed=0, count=240)
    mean, spread = features.mean(dim=0), features.std(dim=0)

    torch.manual_seed(0)
    probe = torch.nn.Linear(features.shape[1], len(NAMES))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(200):
        loss = torch.nn.functional.cross_entropy(probe((features - mean) / spread), colours)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    unseen, right = dataset(encoder, seed=1, count=120)
    with torch.inference_mode():
        guessed = probe((unseen - mean) / spread).argmax(dim=1)
    print(
        f"the colour of {(guessed == right).sum().item()} of {len(right)} unseen pictures is right"
    )


if __name__ == "__main__":
    main()

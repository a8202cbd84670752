# SPDX-License-Identifier: Apache-2.0
"""The requests of the parity tests: zero to three pictures of many sizes and aspect ratios."""

import random

from tests.e2e.engines import Ask
from vllm_spyre_mm.demo import pictures

SIZES = (
    (96, 96),
    (48, 48),
    (120, 60),
    (60, 120),
    (200, 50),
    (40, 160),
    (300, 200),
    (17, 23),
    (144, 96),
)
"""Widths and heights: smaller and larger than the tiles, square, wide and tall."""


def parity_asks(count: int, seed: int = 0) -> list[Ask]:
    """Questions of the kinds that the demo checkpoint was trained on, about drawn pictures.

    In turn without a picture, with one, and with three; every picture after the first few may
    come back, so that the encoder cache and the prefix cache have something to find.
    """
    rng = random.Random(f"parity-{seed}")
    drawn: list[pictures.Picture] = []

    def picture(number: int) -> pictures.Picture:
        if len(drawn) > 4 and rng.random() < 0.3:
            return rng.choice(drawn)
        shapes = pictures.random_shapes(rng, rng.choice((1, 2)))
        background = rng.choice(pictures.BACKGROUNDS)
        drawn.append(pictures.draw_picture(shapes, SIZES[number % len(SIZES)], background, rng))
        return drawn[-1]

    asks = []
    for number in range(count):
        shown = [picture(number + i) for i in range((0, 1, 3)[number % 3])]
        question = pictures.random_questions(rng, shown)[0]
        asks.append(Ask(question.text, tuple(each.image for each in shown)))
    return asks

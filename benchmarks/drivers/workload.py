# SPDX-License-Identifier: Apache-2.0
"""What every engine is asked."""

import random
from typing import Any

PROMPT = "<|user|>\n<image>\n{question}\n<|assistant|>\n"
QUESTION = "What is in the picture?"
SIDES = (448, 448)


def picture(seed: int, sides: tuple[int, int] = SIDES) -> Any:
    """Noise, the same for the same seed.

    Args:
        seed: of the noise.
        sides: width and height.
    """
    from PIL import Image

    width, height = sides
    return Image.frombytes(
        "RGB", (width, height), random.Random(seed).randbytes(3 * width * height)
    )

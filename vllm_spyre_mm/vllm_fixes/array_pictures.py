# SPDX-License-Identifier: Apache-2.0
"""Takes arrays and nested lists for the pictures that they are, and refuses damaged pictures.

:func:`prepare_pictures` is called for the images of every prompt before vLLM parses them
(``frontend.image_processor``).
"""

from typing import Any

from PIL import Image

from vllm_spyre_mm.multimodal.pictures import as_pictures
from vllm_spyre_mm.vllm_fixes.fault import Fault

FAULT = Fault(
    "vLLM takes an array for a picture as it is: the processors guess which axis holds the "
    "channels, each in its own way, and print the pixels where they cannot. It suppresses what a "
    "decoder says while it turns a picture as its EXIF demands, and serves the rows that are "
    "missing as black.",
    seen_in="0.32.0",
)
REPLACED = ()


def prepare_pictures(images: Any) -> Any:
    """The images of a prompt, arrays made pictures of Pillow's, and those decoded.

    Args:
        images: what vLLM takes for ``multi_modal_data["image"]``.

    Raises:
        ValueError: a picture of Pillow's cannot be decoded whole.
    """
    images = as_pictures(images)
    for image in images if isinstance(images, (list, tuple)) else (images,):
        if isinstance(image, Image.Image):
            decode(image)
    return images


def decode(image: Image.Image) -> None:
    """Decode a picture, which Pillow does not try a second time where it failed.

    Raises:
        ValueError: it cannot be decoded whole.
    """
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # there is no end to what decoders raise for damaged files
        raise ValueError(f"Failed to load image: {error}") from error

# SPDX-License-Identifier: Apache-2.0
"""Converts pictures that are given as arrays or nested lists to Pillow's.

An array has height and width, and channels last or first: 1 (grey), 2 (grey and alpha), 3 (RGB) or
4 (RGB and alpha). Integers from 0 to 255, and booleans, become a Pillow image, which every
processor takes. Floating-point pixels stay an array, with three channels.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image

CHANNELS = (1, 2, 3, 4)
"""Numbers of channels; a last axis of such a length is the channel axis, as in vLLM."""

TYPES = "give a picture of Pillow's, or an array of height, width and channels"


def as_pictures(images: Any) -> Any:
    """Convert those images of a prompt that are arrays or nested lists.

    Args:
        images: what vLLM takes: one image, or several in a list or in an array of one more
            dimension. Embeddings (2-D PyTorch tensors) are left as they are.
    """
    if isinstance(images, torch.Tensor) and images.ndim != 4:
        return images
    if isinstance(images, np.ndarray) and images.ndim <= 3:
        return [as_picture(images)]
    if isinstance(images, (list, tuple)) and 2 <= _depth(images) <= 3:
        return [as_picture(images)]
    if isinstance(images, (list, tuple, np.ndarray, torch.Tensor)):
        return [as_picture(image) for image in images]
    return images


def as_picture(image: Any) -> Any:
    """Convert one image to a Pillow image, or to an array of floating-point pixels.

    An image that cannot be converted is returned as it is; :func:`fault_of_picture` says why.
    """
    if isinstance(image, (list, tuple)) and _depth(image):
        try:
            image = np.asarray(image)
        except (ValueError, OverflowError):  # rows of different lengths, numbers of any size
            return image
    if isinstance(image, torch.Tensor) and image.ndim == 3 and _is_plain(image):
        image = image if image.is_floating_point() else image.detach().cpu().numpy()
    if not isinstance(image, (np.ndarray, torch.Tensor)) or fault_of_picture(image) is not None:
        return image
    if isinstance(image, torch.Tensor) or image.dtype.kind == "f":
        return _floating(image)
    pixels = image if image.ndim == 2 else _channels_last(image)
    pixels = pixels.astype(np.uint8) * np.uint8(255 if image.dtype.kind == "b" else 1)
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)


def fault_of_picture(image: object) -> str | None:
    """Why an image of a prompt is no picture, in a few words without its pixels; None if it is one.

    Args:
        image: of any type but a picture of Pillow's.
    """
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        return f"is of type {type(image).__name__}: {TYPES}"
    if isinstance(image, torch.Tensor) and not _is_plain(image):
        return f"is a tensor that is sparse, quantised or without storage: {TYPES}"
    shape, kind = tuple(image.shape), _kind(image)
    said = f"is an array of shape {shape}"
    is_grey = len(shape) == 2 and kind in "iub" and isinstance(image, np.ndarray)
    if len(shape) != 3 and not is_grey:
        return (
            f"{said}: a picture has height, width and channels, and an embedding rows of the "
            "model's hidden size"
        )
    if 0 in shape:
        return f"is empty: an array of shape {shape}"
    if kind not in "iubf":
        return f"{said} and dtype {image.dtype}: pixels are whole numbers or floating-point ones"
    if len(shape) == 3 and not (shape[-1] in CHANNELS or shape[0] in CHANNELS):
        return f"{said}: neither the last nor the first axis has 1, 3 or 4 channels"
    return _fault_of_values(image, kind, said)


def _fault_of_values(image: np.ndarray | torch.Tensor, kind: str, said: str) -> str | None:
    if kind in "iu" and not bool(((image >= 0) & (image <= 255)).all()):
        return f"{said} with numbers outside of 0 to 255"
    if kind == "f" and not bool(_float32(image).isfinite().all()):
        return f"{said} that holds NaN or infinity"
    if kind == "f" and _num_channels(tuple(image.shape)) not in (1, 3):
        return f"{said} of floating-point numbers: give one with an alpha channel as uint8"
    return None


def _kind(image: np.ndarray | torch.Tensor) -> str:
    """NumPy's ``dtype.kind`` of the pixels."""
    if isinstance(image, np.ndarray):
        return image.dtype.kind
    if image.is_floating_point():
        return "f"
    return "c" if image.is_complex() else "i"


def _num_channels(shape: tuple[int, ...]) -> int:
    return shape[-1] if shape[-1] in CHANNELS else shape[0]


def _channels_last(image: np.ndarray) -> np.ndarray:
    return image if image.shape[-1] in CHANNELS else image.transpose(1, 2, 0)


def _floating(image: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Pixels with three channels, on the axis where both vLLM and Transformers look for them.

    vLLM looks at the last axis first, Transformers at the first: a picture that is a few pixels
    wide has its channels last.
    """
    pixels = _float32(image)
    if pixels.shape[-1] in CHANNELS:
        pixels = pixels.permute(2, 0, 1)
    pixels = pixels.expand(3, -1, -1)
    if pixels.shape[-1] in CHANNELS:
        pixels = pixels.permute(1, 2, 0)
    pixels = pixels.contiguous()
    return pixels if isinstance(image, torch.Tensor) else pixels.numpy()


def _float32(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(image, torch.Tensor):
        return image.detach().cpu().float()
    return torch.from_numpy(image.astype(np.float32))


def _is_plain(image: torch.Tensor) -> bool:
    return not (image.is_meta or image.is_quantized) and image.layout == torch.strided


def _depth(nested: Any) -> int:
    """Nesting depth of lists of numbers; 0 if the innermost items are no numbers."""
    depth = 0
    while isinstance(nested, (list, tuple)) and nested:
        nested, depth = nested[0], depth + 1
    return depth if isinstance(nested, (bool, int, float, np.number)) else 0

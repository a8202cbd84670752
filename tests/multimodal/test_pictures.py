# SPDX-License-Identifier: Apache-2.0
"""Arrays and nested lists are the pictures that Pillow makes of them, for every mapping, or are
refused in one line without their pixels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PretrainedConfig
from transformers.models.auto.image_processing_auto import (
    DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS as RESIZED_BY_PILLOW,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY

from tests import architectures, granite4_vision, idefics3
from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.frontend.processor_registration import register_image_processor
from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping

TEXT = architectures.llama(num_hidden_layers=1)
MISTRAL = architectures.mistral(num_hidden_layers=1)
CONFIGS: dict[str, PretrainedConfig | None] = {
    "GraniteVision": None,
    "LlavaNext": architectures.llava_next(TEXT),
    "Llava": architectures.llava(TEXT),
    "Mistral3": architectures.mistral3(MISTRAL),
    "Idefics3": idefics3.idefics3(TEXT),
    "Granite4Vision": granite4_vision.granite4_vision(),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def processor(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Any], Any]:
    """Processes the images of a prompt as an engine does."""
    path, config = checkpoint_path(), CONFIGS[request.param]
    if config is not None:
        path = tmp_path_factory.mktemp(request.param)
        config.save_pretrained(path)
        architectures.save_processor(path, config)
    model_config = EngineArgs(model=str(path)).create_model_config()
    register_image_processor(model_config)  # as the platform does for an engine
    made = MULTIMODAL_REGISTRY.create_processor(model_config)
    image_token_id = get_mm_mapping(model_config.hf_config).image_token_id

    def process(images: Any) -> Any:
        items = made.info.parse_mm_data({"image": images}, validate=False)
        return made([image_token_id] * len(items["image"]), items)

    return process


def pixels_of(processed: Any) -> list[torch.Tensor]:
    return [item["pixel_values"].data for item in processed["mm_kwargs"]["image"]]


RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
GREY, ALPHA = RGB[:, :, 0], RNG.integers(0, 256, (40, 60, 1), dtype=np.uint8)
RGBA, GREY_ALPHA = np.concatenate([RGB, ALPHA], -1), np.concatenate([GREY[..., None], ALPHA], -1)
MASK = GREY > 128


def first(array: np.ndarray) -> np.ndarray:
    """The same picture with its channels first."""
    return np.ascontiguousarray(array.transpose(2, 0, 1))


SAME: dict[str, tuple[Any, Any]] = {
    "RGB": (RGB, RGB),
    "RGB, channels first": (first(RGB), RGB),
    "RGB as wide numbers": (RGB.astype(np.int64), RGB),
    "RGB as 16 bits": (RGB.astype(np.uint16), RGB),
    "RGB in the other byte order": (RGB.astype(">u2"), RGB),
    "RGB with gaps": (np.repeat(RGB, 2, axis=1)[:, ::2], RGB),
    "a tensor": ([torch.from_numpy(RGB)], RGB),
    "a tensor, channels first": ([torch.from_numpy(first(RGB))], RGB),
    "a batch of tensors": (torch.from_numpy(first(RGB))[None], RGB),
    "a batch": (RGB[None], RGB),
    "grey (H, W, 1)": (GREY[..., None], GREY),
    "grey (1, H, W)": (GREY[None], GREY),
    "grey (H, W)": (GREY, GREY),
    "grey (H, W) in a list": ([GREY], GREY),
    "grey and alpha": (GREY_ALPHA, GREY_ALPHA),
    "RGBA": (RGBA, RGBA),
    "RGBA, channels first": (first(RGBA), RGBA),
    "truth values": (MASK, MASK),
    "truth values (H, W, 1)": (MASK[..., None], MASK),
    "truth values in three channels": (np.stack([MASK] * 3, -1), MASK),
    "a nested list": (RGB.tolist(), RGB),
    "a list of nested lists": ([RGB.tolist()], RGB),
    "a nested list of RGBA": (RGBA.tolist(), RGBA),
    "a nested list without channels": (GREY.tolist(), GREY),
    "nested tuples": (tuple(tuple(map(tuple, row)) for row in RGB.tolist()), RGB),
    "as high as it has channels": (RGB[:3], RGB[:3]),
    "one pixel": (RGB[:1, :1], RGB[:1, :1]),
}


@pytest.mark.parametrize("what", list(SAME))
def test_an_array_is_the_picture_that_pillow_makes_of_it(
    processor: Callable[[Any], Any], what: str
):
    images, array = SAME[what]
    given, expected = processor(images), processor([Image.fromarray(array)])
    assert given["prompt_token_ids"] == expected["prompt_token_ids"]
    for mine, theirs in zip(pixels_of(given), pixels_of(expected), strict=True):
        assert torch.equal(mine, theirs)


def test_pictures_of_every_kind_in_one_prompt(processor: Callable[[Any], Any]):
    images = [Image.fromarray(RGB), RGBA, torch.from_numpy(GREY[None]), GREY_ALPHA.tolist()]
    expected = [Image.fromarray(array) for array in (RGB, RGBA, GREY, GREY_ALPHA)]
    given, theirs = processor(images), processor(expected)
    assert given["prompt_token_ids"] == theirs["prompt_token_ids"]
    assert all(map(torch.equal, pixels_of(given), pixels_of(theirs)))


FLOATS: dict[str, tuple[Any, Any]] = {
    "channels first": (first(RGB).astype(np.float32), RGB),
    "channels last": (RGB.astype(np.float32), RGB),
    "of 64 bits": (RGB.astype(np.float64), RGB),
    "of more bits": (RGB.astype(np.longdouble), RGB),
    "a tensor": ([torch.from_numpy(RGB).bfloat16()], RGB),
    "grey (H, W, 1)": (GREY[..., None].astype(np.float32), GREY),
    "grey (1, H, W)": (GREY[None].astype(np.float32), GREY),
    "as high as it has channels": (RGB[:3].astype(np.float32), RGB[:3]),
    "as wide as it has channels": (RGB[:, :3].astype(np.float32), RGB[:, :3]),
    "a nested list": (RGB.astype(np.float32).tolist(), RGB),
}


@pytest.mark.parametrize("what", list(FLOATS))
def test_floating_point_pixels_are_scaled_as_the_others(
    request: pytest.FixtureRequest, processor: Callable[[Any], Any], what: str
):
    """They are not rounded after they were resized: that is all that differs."""
    if f"{request.node.callspec.params['processor']}ImageProcessor" in RESIZED_BY_PILLOW:
        pytest.skip("beside torchvision before 0.27 Pillow resizes, which takes no such pixels")
    images, array = FLOATS[what]
    given, expected = processor(images), processor([Image.fromarray(array)])
    assert given["prompt_token_ids"] == expected["prompt_token_ids"]
    for mine, theirs in zip(pixels_of(given), pixels_of(expected), strict=True):
        assert mine.shape == theirs.shape
        spread = (theirs.max() - theirs.min()).item()
        assert (mine.float() - theirs.float()).abs().mean() < 0.02 * spread


REFUSED: dict[str, tuple[Any, str]] = {
    "five channels": (np.zeros((40, 60, 5), np.uint8), "neither the last nor the first axis"),
    "numbers beyond 255": (RGB.astype(np.uint16) * 257, "with numbers outside of 0 to 255"),
    "negative numbers": (RGB.astype(np.int16) - 128, "with numbers outside of 0 to 255"),
    "a tensor of them": ([torch.full((3, 4, 4), 256)], "with numbers outside of 0 to 255"),
    "floating-point RGBA": (RGBA.astype(np.float32), "give one with an alpha channel as uint8"),
    "NaN": (np.full((4, 4, 3), np.nan), "holds NaN or infinity"),
    "complex numbers": (RGB.astype(complex), "and dtype complex128: pixels are"),
    "objects": (RGB.astype(object), "and dtype object: pixels are"),
    "texts": (np.full((4, 4, 3), "x"), "and dtype <U1: pixels are"),
    "a nested list of texts": ([[["x"] * 3] * 4] * 4, "is of type list: give a picture"),
    "rows of different lengths": ([[[1, 2, 3]], [[1, 2, 3], [4, 5, 6]]], "is of type list: give"),
    "numbers of any size": ([[[2**70] * 3] * 4] * 4, "and dtype object: pixels are"),
    "a floating-point matrix": ([np.zeros((40, 60))], "a picture has height, width and channels"),
    "a row": (np.zeros(60, np.uint8), "a picture has height, width and channels"),
    "no rows": (np.zeros((0, 60, 3), np.uint8), "is empty: an array of shape"),
    "a path": (["picture.png"], "is of type str: give a picture"),
    "bytes": ([b"PNG"], "is of type bytes: give a picture"),
    "a number": ([7], "is of type int: give a picture"),
    "a tensor without storage": ([torch.empty(3, 4, 4, device="meta")], "without storage: give"),
    "a sparse tensor": ([torch.zeros(3, 4, 4).to_sparse()], "sparse, quantised or without"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_is_no_picture_is_refused_in_one_line(processor: Callable[[Any], Any], what: str):
    images, sentence = REFUSED[what]
    with pytest.raises(VLLMValidationError) as error:
        processor(images)
    message = str(error.value)
    assert "image 0 of the prompt" in message
    assert sentence in message
    assert "\n" not in message
    assert len(message) < 250


def test_embeddings_are_left_alone(tmp_path: Path):
    from vllm_spyre_mm.multimodal.pictures import as_pictures

    matrix, batch = torch.zeros(5, 16), torch.zeros(2, 5, 16)
    assert as_pictures(batch) is batch
    assert as_pictures([matrix])[0] is matrix
    picture = Image.fromarray(RGB)
    assert as_pictures(picture) is picture
    assert as_pictures([picture, None]) == [picture, None]
    assert as_pictures(None) is None

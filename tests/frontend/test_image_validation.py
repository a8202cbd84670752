# SPDX-License-Identifier: Apache-2.0
"""An image that cannot be used is refused with a sentence that says which one, and why."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vllm.exceptions import VLLMValidationError

from vllm_spyre_mm.frontend.image_validation import (
    validate_image_embeddings,
    validate_images,
    validate_tags,
)

EMBEDDINGS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill, dtype=torch.float32).to(dtype),
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32,
                     torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]),
    st.sampled_from([0.0, 1.0, -3.5, float("inf"), float("nan"), 1e38]),
)  # fmt: skip


@given(st.lists(EMBEDDINGS, max_size=3))
def test_image_embeddings_fit_the_decoder_or_are_refused(embeddings: list[torch.Tensor]):
    fits = all(
        each.ndim == 2
        and each.shape[1] == 4
        and len(each)
        and each.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        and each.isfinite().all()
        for each in embeddings
    )
    if fits:
        validate_image_embeddings(embeddings, 4)
    else:
        with pytest.raises(VLLMValidationError, match=r"image embedding \d of the prompt"):
            validate_image_embeddings(embeddings, 4)


def test_the_features_of_a_video_are_named_as_such():
    with pytest.raises(VLLMValidationError, match="video embedding 2 of the prompt, of") as error:
        validate_image_embeddings([torch.ones(3, 5)], 4, [2], modality="video")
    assert error.value.parameter == "video"


@pytest.mark.parametrize(("num_items", "num_tags"), [(1, 0), (3, 2)])
def test_missing_tags_are_refused_with_both_counts(num_items: int, num_tags: int):
    with pytest.raises(VLLMValidationError, match="one tag into the prompt for each") as error:
        validate_tags("image", num_items, num_tags)
    assert f"has {num_tags} image tag(s) for {num_items} image(s)" in str(error.value)
    assert error.value.parameter == "image"


PICTURE = Image.new("RGB", (4, 3))


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ([Image.new("RGB", (0, 10))], r"image 0 of the prompt is empty: 0x10 pixels"),
        ([PICTURE, Image.new("L", (10, 0))], r"image 1 of the prompt is empty: 10x0 pixels"),
        ([None, np.zeros((0, 5, 3))], r"image 1 .* empty: an array of shape \(0, 5, 3\)"),
        ([torch.zeros(3, 7, 0)], r"image 0 .* empty: an array of shape \(3, 7, 0\)"),
    ],
)
def test_a_picture_without_pixels_is_refused_with_its_size(images: list[Any], sentence: str):
    with pytest.raises(VLLMValidationError, match=sentence) as error:
        validate_images(images)
    assert error.value.parameter == "image"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_picture_of_no_numbers_is_refused(value: float):
    array = np.zeros((2, 3, 3), np.float32)
    array[1, 2, 0] = value
    for image in (array, torch.from_numpy(array)):
        with pytest.raises(VLLMValidationError, match=r"image 1 of the prompt.*NaN or infinity"):
            validate_images([PICTURE, image])
    validate_images([np.zeros((2, 3, 3), np.uint8)])


def test_good_pictures_are_left_to_vllm():
    validate_images([PICTURE, None, np.zeros((1, 1, 3)), torch.zeros(3, 1, 1)])

# SPDX-License-Identifier: Apache-2.0
"""Pictures and embeddings are told apart, and put back into their order."""

from typing import Any

import pytest
import torch
from PIL import Image

from vllm_spyre_mm.frontend.mixed_images import Mixture, are_embeddings, mixture_of

PICTURE = Image.new("RGB", (6, 4))
ROWS = torch.ones(3, 8)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([PICTURE, ROWS], (False, True)),
        ([ROWS, torch.ones(3, 4, 6)], (True, False)),
        ((None, ROWS, PICTURE), (False, True, False)),
        ([{"image_embeds": ROWS}, PICTURE], (True, False)),
        ([{"image_embeds": ROWS}, {"image_embeds": ROWS}], None),
        ({"image_embeds": ROWS}, None),
        ([PICTURE, PICTURE], None),
        ([ROWS, ROWS], None),
        (ROWS[None], None),
        ([], None),
        (PICTURE, None),
    ],
)
def test_a_matrix_among_others_is_an_embedding(images: Any, expected: Any) -> None:
    mixture = mixture_of(images)
    assert (mixture and mixture.is_embedding) == expected


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ({"image_embeds": ROWS}, True),
        ([{"image_embeds": ROWS}, ROWS], True),
        (ROWS, True),
        (ROWS[None], True),
        ([ROWS, PICTURE], False),
        ([], False),
        (PICTURE, False),
        (None, False),
    ],
)
def test_items_that_are_all_embeddings(items: Any, expected: bool) -> None:
    assert are_embeddings(items) is expected


def test_values_go_back_to_where_they_were() -> None:
    mixture = Mixture([True, False, False, True])
    assert mixture.select("abcd", embeddings=True) == ["a", "d"]
    assert mixture.indices(embeddings=False) == [1, 2]
    assert mixture.merge(["b", "c"], ["a", "d"]) == list("abcd")

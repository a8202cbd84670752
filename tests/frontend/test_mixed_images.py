# SPDX-License-Identifier: Apache-2.0
"""Pictures and embeddings are told apart, processed by kind, and put back into their order."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.parse import (
    ImageEmbeddingItems,
    ImageProcessorItems,
    MultiModalDataParser,
)
from vllm.renderers import chat_utils

from vllm_spyre_mm.frontend.hooks import install
from vllm_spyre_mm.frontend.mixed_images import Mixture, mixture_of

PICTURE = Image.new("RGB", (6, 4))
ROWS = torch.ones(3, 8)


@pytest.fixture(autouse=True)
def _installed() -> None:
    install()


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([PICTURE, ROWS], (False, True)),
        ([ROWS, torch.ones(3, 4, 6)], (True, False)),
        ((None, ROWS, PICTURE), (False, True, False)),
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


def test_values_go_back_to_where_they_were() -> None:
    mixture = Mixture([True, False, False, True])
    assert mixture.select("abcd", embeddings=True) == ["a", "d"]
    assert mixture.indices(embeddings=False) == [1, 2]
    assert mixture.merge(["b", "c"], ["a", "d"]) == list("abcd")


def test_vllms_parser_makes_items_of_each_kind() -> None:
    parser = MultiModalDataParser(expected_hidden_size=8)
    items: Any = parser.parse_mm_data({"image": [ROWS, PICTURE, ROWS * 2]})["image"]
    assert isinstance(items.pictures, ImageProcessorItems)
    assert isinstance(items.embeddings, ImageEmbeddingItems)
    assert (len(items), len(items.pictures), len(items.embeddings)) == (3, 1, 2)
    assert torch.equal(items[2], ROWS * 2)
    with pytest.raises(ValueError, match="hidden dimension"):
        parser.parse_mm_data({"image": [PICTURE, ROWS[:, :5]]})


def test_a_chat_keeps_the_order_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    processor: Any = SimpleNamespace()
    items: Any = {"image_embeds": [(ROWS, None), (ROWS * 2, "b")], "image": [(PICTURE, "a")]}
    order = {"image": ["image_embeds", "image", "image_embeds"]}
    monkeypatch.setattr(chat_utils, "_get_embeds_data", lambda modality, data, processor: data)
    resolved: Any = chat_utils._resolve_items(items, processor, order)
    data, uuids = resolved
    assert data["image"][1] is PICTURE
    assert torch.equal(data["image"][2], ROWS * 2)
    assert uuids["image"] == [None, "a", "b"]


def test_embeddings_of_several_tensors_are_not_for_mixing(monkeypatch: pytest.MonkeyPatch) -> None:
    items: Any = {"image_embeds": [({"image_embeds": ROWS}, None)], "image": [(PICTURE, None)]}
    monkeypatch.setattr(chat_utils, "_get_embeds_data", lambda modality, data, processor: data[0])
    processor: Any = SimpleNamespace()
    with pytest.raises(VLLMValidationError, match="one tensor for each image"):
        chat_utils._resolve_items(items, processor, {"image": ["image_embeds", "image"]})

# SPDX-License-Identifier: Apache-2.0
"""Whatever goes wrong while images are encoded becomes one error that names them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.multimodal.inputs import (
    BaseMultiModalField,
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.worker.encoding import ImageEncodingError, encode_images

Encode = Callable[[Any], list[torch.Tensor]]


def image(
    num_features: int,
    key: str = "pixel_values",
    modality: str = "image",
    field: BaseMultiModalField | None = None,
) -> MultiModalFeatureSpec:
    rows = torch.ones(num_features, 4, dtype=torch.float64)
    item = MultiModalKwargsItem(
        {key: MultiModalFieldElem(data=rows, field=field or MultiModalBatchedField())}
    )
    place = PlaceholderRange(offset=0, length=num_features)
    return MultiModalFeatureSpec(
        data=item, modality=modality, identifier=f"of {num_features}", mm_position=place
    )


def encode(model: Encode, *images: MultiModalFeatureSpec, first: int = 0) -> list[torch.Tensor]:
    numbered = dict(enumerate(images, first))
    mapping = SimpleNamespace(feature_width=4)
    served: Any = SimpleNamespace(encode_pieces=in_one_piece(model), mapping=mapping)
    return encode_images(served, numbered, torch.bfloat16, torch.float16)


def in_one_piece(encode: Encode) -> Callable[[Any], Pieces[list[torch.Tensor]]]:
    def pieces(mm_kwargs: Any) -> Pieces[list[torch.Tensor]]:
        yield from ()
        return encode(mm_kwargs)

    return pieces


def fail(error: Exception) -> Encode:
    def encode(mm_kwargs: Any) -> list[torch.Tensor]:
        raise error

    return encode


@pytest.mark.parametrize("error", [ValueError("no"), MemoryError("no"), RuntimeError("no")])
def test_what_the_encoder_raises_is_named_with_the_images(error: Exception) -> None:
    sentence = f"^images 2, 3 of the request could not be encoded: {type(error).__name__}: no$"
    with pytest.raises(ImageEncodingError, match=sentence) as raised:
        encode(fail(error), image(3), image(3), first=1)
    assert raised.value.__cause__ is error


def test_items_of_several_kinds_are_named_by_kind() -> None:
    """Their numbers are places among all items of the request."""
    video = image(3, "pixel_values_videos", "video")
    with pytest.raises(ImageEncodingError, match=r"^images 1, 3 and video 2 of the request could"):
        encode(fail(ValueError("no")), image(3), video, image(3))
    with pytest.raises(ImageEncodingError, match=r"^video 1 of .* \(2, 4\), .* 3 positions"):
        encode(lambda _: [torch.zeros(2, 4)], video)


def test_features_that_the_decoder_cannot_hold_are_refused() -> None:
    """They would be infinite in its embeddings."""
    features = torch.zeros(3, 4, dtype=torch.bfloat16)
    features[2, 1] = 70_000
    with pytest.raises(ImageEncodingError, match=r"image 1 of .* up to 70144, which") as it:
        encode(lambda _: [features], image(3))
    assert "decoder's float16 cannot hold" in str(it.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    features = torch.zeros(3, 4, dtype=torch.bfloat16)
    features[2, 1] = value
    with pytest.raises(ImageEncodingError, match=r"image 1 of .* NaN or infinity in bfloat16"):
        encode(lambda _: [features], image(3))


def test_another_number_of_features_is_refused() -> None:
    with pytest.raises(ImageEncodingError, match=r"^image 1 of .* \(2, 4\), .* 3 positions"):
        encode(lambda _: [torch.zeros(2, 4)], image(3))


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(ImageEncodingError, match=r"^image 1 of .* of 8 elements, .* have 4: "):
        encode(lambda _: [torch.zeros(3, 8)], image(3))


def test_embeddings_that_are_given_are_converted_and_not_encoded() -> None:
    (features,) = encode(fail(AssertionError("asked")), image(3, "image_embeds"))
    assert features.dtype == torch.bfloat16
    assert features.shape == (3, 4)


FLAT = MultiModalFlatField(slices=[slice(0, 9)])
"""Of models whose images have no size in common: a batch of them is one tensor."""


def test_given_items_keep_their_place_among_those_that_are_encoded() -> None:
    """Of any modality, and whether their batch would be a list or one tensor."""
    asked = []

    def count(mm_kwargs: Any) -> list[torch.Tensor]:
        asked.append(sorted(mm_kwargs))
        ((_, rows),) = mm_kwargs.items()
        return [torch.zeros(len(each), 4) for each in rows]

    encoded = encode(
        count,
        image(3, "image_embeds", field=FLAT),
        image(5, "image_embeds", field=FLAT),
        image(2),
        image(4, "video_embeds", "video", FLAT),
        image(6),
        image(7, "pixel_values_videos", "video"),
    )
    assert [len(features) for features in encoded] == [3, 5, 2, 4, 6, 7]
    assert [bool(features.all()) for features in encoded] == [True, True, False, True, False, False]
    assert asked == [["pixel_values"], ["pixel_values_videos"]]


def test_an_encoder_that_forgets_an_item_is_an_error() -> None:
    with pytest.raises(ImageEncodingError, match="images 1, 2 of the request could not be encoded"):
        encode(lambda _: [torch.zeros(3, 4)], image(3), image(3))

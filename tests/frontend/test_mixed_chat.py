# SPDX-License-Identifier: Apache-2.0
"""Embeddings among a chat's pictures keep their place."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from vllm_spyre_mm.frontend.mixed_chat import (
    embeddings_to_load,
    read_once,
    unwrapped,
    with_loaded,
)

ROWS = torch.ones(3, 8)
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TEXT = {"type": "text", "text": "hello"}


def embedding(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image_embeds", "image_embeds": value, **more}


def to_load(chat: list[Any], modality: str = "image", *, has_grid: bool = False) -> list[Any]:
    return embeddings_to_load(chat, modality, has_grid=has_grid)


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def test_a_chat_keeps_the_order_of_its_parts() -> None:
    system = {"role": "system", "content": "hello"}
    chat = [system, user(embedding("a"), PICTURE), user("plain", embedding("b", uuid="x"), TEXT)]
    assert to_load(chat) == ["a", "b"]
    first, second, third = with_loaded(chat, "image", [ROWS, None])
    loaded = second["content"][0]["image_pil"]
    assert loaded.size == (24, 1)
    assert unwrapped(loaded) is ROWS
    assert first == system
    assert second == user({"image_pil": loaded}, PICTURE)
    assert third == user("plain", {"image_pil": None, "uuid": "x"}, TEXT)
    assert chat[1] == user(embedding("a"), PICTURE)


@pytest.mark.parametrize(
    "picture",
    [PICTURE, {"image_url": "u"}, {"image_pil": None}, {"type": "input_image", "image_url": "u"}],
)
def test_a_part_may_say_what_it_is_by_its_fields(picture: dict[str, Any]) -> None:
    assert to_load([user(picture, {"image_embeds": "a"})]) == ["a"]


@pytest.mark.parametrize(
    "chat",
    [
        [user(embedding("a"), embedding("b"))],
        [user(PICTURE, TEXT)],
        [user(embedding({"image_embeds": "a"}))],
        [{"role": "user", "content": "hello"}, {"role": "user"}],
        [],
    ],
)
def test_a_chat_of_one_kind_is_left_to_vllm(chat: list[Any]) -> None:
    assert to_load(chat) == []


def test_embeddings_of_several_tensors_are_not_for_mixing() -> None:
    chat = [user(embedding({"image_embeds": "a"})), user(PICTURE)]
    with pytest.raises(VLLMValidationError, match="one tensor for each image"):
        to_load(chat)


def test_embeddings_of_several_tensors_are_always_loaded_where_a_model_takes_them() -> None:
    """vLLM would load the grid as if it were features, and pad widths that differ."""
    both = {"image_embeds": "a", "image_grid_thw": [1, 4, 6]}
    chat = [user(embedding(both), PICTURE, embedding(None))]
    assert to_load(chat, has_grid=True) == [both, None]
    assert to_load([user(embedding(both))], has_grid=True) == [both]
    assert to_load([user(embedding("a"))], has_grid=True) == ["a"]
    assert to_load([user(PICTURE)], has_grid=True) == []


VIDEO = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}


def test_videos_and_their_embeddings_are_told_from_images() -> None:
    given = {"type": "video_embeds", "video_embeds": {"video_embeds": "a"}, "uuid": "x"}
    chat = [user(given, PICTURE, VIDEO, embedding("b"))]
    assert to_load(chat, "video", has_grid=True) == [given["video_embeds"]]
    assert to_load(chat, "image", has_grid=True) == ["b"]
    (message,) = with_loaded(chat, "video", [{"video_embeds": ROWS}])
    first, *others = message["content"]
    assert others == [PICTURE, VIDEO, embedding("b")]
    assert first.keys() == {"video_url", "uuid"}
    url = first["video_url"]
    assert isinstance(url, str)
    assert url
    assert unwrapped(url.loaded) == {"video_embeds": ROWS}  # type: ignore[attr-defined]
    (message,) = with_loaded(chat, "video", [None])
    assert message["content"][0] == {"video_url": None, "uuid": "x"}


def test_parts_that_can_be_read_once_are_kept() -> None:
    def parts() -> Iterator[Any]:
        yield PICTURE
        yield TEXT

    assert read_once({"role": "user", "content": parts()}) == user(PICTURE, TEXT)
    for message in (user(TEXT), {"role": "user", "content": "hello"}, {"role": "user"}, "hello"):
        assert read_once(message) is message

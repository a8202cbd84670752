# SPDX-License-Identifier: Apache-2.0
"""Embeddings among a chat's pictures keep their place."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from vllm_spyre_mm.frontend.mixed_chat import (
    embeddings_among_pictures,
    read_once,
    unwrapped,
    with_loaded,
)

ROWS = torch.ones(3, 8)
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TEXT = {"type": "text", "text": "hello"}


def embedding(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image_embeds", "image_embeds": value, **more}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def test_a_chat_keeps_the_order_of_its_parts() -> None:
    system = {"role": "system", "content": "hello"}
    chat = [system, user(embedding("a"), PICTURE), user("plain", embedding("b", uuid="x"), TEXT)]
    assert embeddings_among_pictures(chat) == ["a", "b"]
    first, second, third = with_loaded(chat, [ROWS, None])
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
    assert embeddings_among_pictures([user(picture, {"image_embeds": "a"})]) == ["a"]


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
    assert embeddings_among_pictures(chat) == []


def test_embeddings_of_several_tensors_are_not_for_mixing() -> None:
    chat = [user(embedding({"image_embeds": "a"})), user(PICTURE)]
    with pytest.raises(VLLMValidationError, match="one tensor for each image"):
        embeddings_among_pictures(chat)


def test_parts_that_can_be_read_once_are_kept() -> None:
    def parts() -> Iterator[Any]:
        yield PICTURE
        yield TEXT

    assert read_once({"role": "user", "content": parts()}) == user(PICTURE, TEXT)
    for message in (user(TEXT), {"role": "user", "content": "hello"}, {"role": "user"}, "hello"):
        assert read_once(message) is message

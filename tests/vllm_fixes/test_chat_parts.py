# SPDX-License-Identifier: Apache-2.0
"""A client's name for an image is not its key in the caches, unless the server trusts it."""

from collections.abc import Iterator
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from vllm_spyre_mm.vllm_fixes.chat_parts import check_message, without_uuids

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TEXT = {"type": "text", "text": "hello", "uuid": None}
NAMED = IMAGE | {"uuid": "mine"}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def test_the_name_of_an_image_is_taken_from_it():
    message = user(NAMED, TEXT, "plain", {"image_embeds": "AAAA", "uuid": 5})
    assert without_uuids(message) == user(IMAGE, TEXT, "plain", {"image_embeds": "AAAA"})
    assert message["content"][0] is NAMED
    assert NAMED["uuid"] == "mine"


@pytest.mark.parametrize(
    "message", [{"role": "user", "content": "hello"}, {"role": "user"}, {"content": None}, "hello"]
)
def test_what_has_no_parts_stays_as_it_is(message: Any):
    assert without_uuids(message) is message


def test_parts_that_can_be_read_once_are_kept():
    def parts() -> Iterator[Any]:
        yield NAMED
        yield TEXT

    assert without_uuids({"role": "user", "content": parts()}) == user(IMAGE, TEXT)


def test_content_as_the_server_validates_it():
    request = ChatCompletionRequest.model_validate({"messages": [user(NAMED, TEXT)]})
    first, second = without_uuids(request.messages[0])["content"]
    assert "uuid" not in first
    assert first["image_url"] == IMAGE["image_url"]
    assert second["text"] == "hello"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": None, "uuid": "another's"},
        {"type": "image_embeds", "image_embeds": None, "uuid": "another's"},
        {"type": "video_url", "video_url": None, "uuid": "another's"},
        {"type": "video_embeds", "video_embeds": None, "uuid": "another's"},
        {"uuid": "another's"},
    ],
)
def test_what_is_only_named_is_refused(part: dict[str, Any]):
    with pytest.raises(VLLMValidationError, match="send it") as error:
        without_uuids(user(TEXT, part))
    assert error.value.parameter == "uuid"


@pytest.mark.parametrize("field", ["video_url", "video_embeds"])
def test_the_name_of_a_video_is_taken_from_it(field: str):
    message = user({"type": field, field: "AAAA", "uuid": "mine"})
    assert without_uuids(message) == user({"type": field, field: "AAAA"})


@pytest.mark.parametrize("kind", ["image_embeds", "video_embeds"])
@pytest.mark.parametrize("value", [None, 5, {"deep": "AAAA"}, True])
def test_an_embedding_of_fields_that_are_none_is_refused(value: Any, kind: str):
    """vLLM fails at it with an AttributeError, HTTP 500."""

    part = {"type": kind, kind: {"y": [1, 2], "z": "AAAA", "x": value}}
    with pytest.raises(VLLMValidationError, match="'x' of an embedding must be base64") as error:
        check_message(user(TEXT, part))
    assert error.value.parameter == kind


@pytest.mark.parametrize("embedding", [None, "AAAA", {}, {"y": [1, 2], "z": "AAAA"}])
def test_other_embeddings_are_left_to_vllm(embedding: Any):
    check_message(user(TEXT, "plain", NAMED, {"image_embeds": embedding}))
    check_message({"role": "user", "content": "hello"})
    check_message("hello")

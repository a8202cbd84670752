# SPDX-License-Identifier: Apache-2.0
"""``/v1/mm_embeddings``: images without a question."""

import json
from typing import Any

import openai
import pytest
import torch
from PIL import Image

from tests.e2e.server_embeddings.requests import ask, drawn, parts_of, post
from vllm_spyre_mm.payload import decode_mm_embedding


def test_images_alone_have_the_embeddings_that_a_chat_returns(
    server: str, client: openai.OpenAI
) -> None:
    images = (drawn(20), drawn(21, (60, 90)))
    status, body = post(server, {"input": parts_of(*images)})
    assert status == 200
    asked = ask(client, *images).choices[0]
    found, wanted = body["mm_embedding"], asked.mm_embedding
    assert torch.equal(decode_mm_embedding(found), decode_mm_embedding(wanted))
    assert [item["content_hash"] for item in found["items"]] == [
        item["content_hash"] for item in wanted["items"]
    ]


def test_a_prompt_is_answered_rightly_after_its_images_were_embedded_alone(
    server: str, client: openai.OpenAI
) -> None:
    """No decoder ran for them: their blocks must not be found in the prefix cache."""
    image = drawn(22)
    for _ in range(2):
        assert post(server, {"input": parts_of(image)})[0] == 200
    after = ask(client, image).choices[0].message.content
    fresh = ask(client, image, extra_body={"cache_salt": "fresh"}).choices[0].message.content
    assert after == fresh
    assert len(after) > 10


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"input": [{"type": "text", "text": "hello"}]}, "images and videos alone, not text"),
        ({"input": []}, "input"),
        ({}, "input"),
        ({"input": parts_of(Image.new("RGB", (9, 9))), "return_mm_embedding": False}, "false"),
        ({"input": parts_of(Image.new("RGB", (9, 9))), "return_mm_embedding": "yes"}, "str"),
        ({"input": parts_of(Image.new("RGB", (9, 9))), "dimensions": 5}, "dimensions"),
        (
            {"input": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
            "Failed to load image",
        ),
        ({"input": parts_of(Image.new("RGB", (9, 9))), "model": "other"}, "other"),
    ],
    ids=[
        "text",
        "empty",
        "missing",
        "false",
        "text for a choice",
        "unknown field",
        "no picture",
        "another model",
    ],
)
def test_what_is_no_image_is_the_clients_error(server: str, body: Any, named: str) -> None:
    status, answer = post(server, body)
    assert 400 <= status < 500
    assert named in json.dumps(answer)
    assert post(server, {"input": parts_of(drawn(23))})[0] == 200

# SPDX-License-Identifier: Apache-2.0
"""The choice that finishes gets the embedding, and nothing else of a response changes."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from tests import qwen_vl
from vllm_spyre_mm.frontend.http.openai_responses import (
    add_to_events,
    add_to_models,
    add_to_response,
)


def test_only_events_in_which_a_choice_finishes_are_touched():
    running = 'data: {"choices": [{"index": 0, "finish_reason": null}]}\n\n'
    for event in (running, "data: [DONE]\n\n", ": ping\n\n", 'data: {"choices": []}\n\n'):
        assert add_to_events(event.encode(), {0: "x"}.get) == event.encode()
    finished = 'data: {"choices": [{"index": 1, "finish_reason": "stop", "text": "é"}]}\n\n'
    changed = add_to_events(finished.encode(), {1: "x"}.get).decode()
    assert changed.endswith("\n\n")
    (choice,) = json.loads(changed.removeprefix("data: "))["choices"]
    assert choice == {
        "index": 1,
        "finish_reason": "stop",
        "text": "é",
        "mm_embedding": "x",
    }


def test_events_that_come_together():
    one = b'data: {"choices":[{"index":0,"finish_reason":"stop"}]}\n\n'
    usage = b'data: {"choices":[],"usage":{"total_tokens":3}}\n\n'
    changed = add_to_events(one + usage + b"data: [DONE]\n\n", {0: "x"}.get)
    added = one.replace(b'"stop"', b'"stop","mm_embedding":"x"')
    assert changed == added + usage + b"data: [DONE]\n\n"


def test_every_choice_of_a_whole_response():
    body = '{"id":"é","choices":[{"index":1,"finish_reason":"stop"},{"index":0}]}'.encode()
    assert json.loads(add_to_response(body, {1: "x"}.get)) == {
        "id": "é",
        "choices": [
            {"index": 1, "finish_reason": "stop", "mm_embedding": "x"},
            {"index": 0, "mm_embedding": None},
        ],
    }


@pytest.mark.parametrize("body", [b'{"error": {"message": "x"}}', b"[1, 2]", b'{"choices": []}'])
def test_a_response_without_choices_is_not_touched(body: bytes):
    assert add_to_response(body, {0: "x"}.get) == body


@pytest.mark.parametrize("on", [False, True])
def test_the_list_of_models(on: bool):
    config: Any = SimpleNamespace(
        additional_config={
            "enable_return_mm_embedding": on,
            "encoder_dtype": "float32",
            "max_mm_embedding_response_bytes": 7,
        },
        model_config=SimpleNamespace(hf_config=qwen_vl.qwen3_vl()),
    )
    body = b'{"object":"list", "data":[{"id":"demo"}]}'
    told = {
        "hidden_size": 256,
        "levels": 3,
        "modalities": ["image", "video"],
        "dtype": "float32",
        "max_bytes": 7,
    }
    changed = add_to_models(body, config)
    assert json.loads(changed)["data"] == [{"id": "demo"} | ({"mm_embedding": told} if on else {})]
    assert on or changed == body

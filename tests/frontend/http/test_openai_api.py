# SPDX-License-Identifier: Apache-2.0
"""The field of HTTP requests becomes a choice, and responses get the embedding that was noted."""

import json
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from vllm.entrypoints.launchers import app as launchers
from vllm.entrypoints.openai.chat_completion import batch_serving
from vllm.entrypoints.openai.chat_completion import serving as chat_serving
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion import serving as completion_serving
from vllm.exceptions import VLLMValidationError

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.frontend.http import openai_api
from vllm_spyre_mm.frontend.http.middleware import EmbeddingMiddleware
from vllm_spyre_mm.frontend.http.openai_api import add_to_event, read_field

KEY, KEY_OF_SETTING = "return_mm_embedding", "enable_return_mm_embedding"
ON = SpyreSettings(enable_return_mm_embedding=True, max_mm_embedding_response_bytes=1000)
OFF = SpyreSettings()


def request(**fields: Any) -> ChatCompletionRequest:
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    return ChatCompletionRequest.model_validate({"messages": messages, **fields})


def extra_args(asked: ChatCompletionRequest) -> Any:
    """What the engine is told."""
    return asked.to_sampling_params(8, {}).extra_args


def test_without_the_field_nothing_is_returned():
    asked = request()
    read_field(asked, ON)
    assert extra_args(asked) == {"return_mm_embedding": False}


def test_an_engine_without_embeddings_sees_requests_as_they_came():
    asked = request()
    read_field(asked, OFF)
    assert extra_args(asked) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"return_mm_embedding": {"pooling": "image"}},
        {"vllm_xargs": {"return_mm_embedding": 1}},
        {"return_mm_embedding": True, "encoding_format": "float"},
    ],
    ids=str,
)
def test_the_field_reaches_the_engine_with_the_servers_limit(fields: dict[str, Any]):
    asked = request(**fields)
    read_field(asked, ON)
    choice = extra_args(asked)["return_mm_embedding"]
    assert choice["max_bytes"] == 1000
    assert choice["pooling"] == ("image" if "pooling" in str(fields) else "raw")
    assert choice["encoding_format"] == fields.get("encoding_format", "base64")
    assert "return_mm_embedding" not in (asked.model_extra or {})


@pytest.mark.parametrize(("given", "limit"), [(10, 10), (5000, 1000)])
def test_a_limit_of_the_clients_is_not_raised(given: int, limit: int):
    asked = request(return_mm_embedding={"max_bytes": given})
    read_field(asked, ON)
    assert extra_args(asked)["return_mm_embedding"]["max_bytes"] == limit


@pytest.mark.parametrize(("n", "limit"), [(1, 1000), (4, 250), (5000, 1)])
def test_the_answers_of_a_response_share_its_limit(n: int, limit: int):
    asked = request(return_mm_embedding=True, n=n)
    read_field(asked, ON)
    assert extra_args(asked)["return_mm_embedding"]["max_bytes"] == limit


def test_the_requests_of_a_batch_share_its_limit():
    asked = request(return_mm_embedding=True)
    read_field(asked, ON, answers=8)
    assert extra_args(asked)["return_mm_embedding"]["max_bytes"] == 125


@pytest.mark.parametrize("fields", [{"return_mm_embedding": True}, {"vllm_xargs": {KEY: 1}}])
def test_a_beam_search_returns_none(fields: dict[str, Any]):
    with pytest.raises(VLLMValidationError, match="not returned with use_beam_search"):
        read_field(request(use_beam_search=True, **fields), ON)
    declined = request(use_beam_search=True, return_mm_embedding=False)
    read_field(declined, ON)
    assert extra_args(declined) == {KEY: False}


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("by", ["flag", "config"])
@pytest.mark.parametrize("task", ["generate", "render"])
def test_the_route_of_images_alone_is_there_when_the_feature_is_on(on: bool, by: str, task: str):
    openai_api.install()
    app = FastAPI()
    config = {KEY_OF_SETTING: on} if by == "config" else {}
    args = {"additional_config": config, KEY_OF_SETTING: on and by == "flag"}
    app.state.args = SimpleNamespace(**args)
    launchers.attach_endpoint_plugins(app, (task,))
    has_engine = task == "generate"
    there = "/v1/mm_embeddings" in app.openapi()["paths"]
    assert there is (on and has_engine)
    assert (EmbeddingMiddleware in [each.cls for each in app.user_middleware]) is has_engine


def test_declining():
    asked = request(return_mm_embedding=False)
    read_field(asked, ON)
    assert extra_args(asked) == {"return_mm_embedding": False}


@pytest.mark.parametrize("value", ["yes", {"pooling": "median"}, 7])
def test_what_there_is_not(value: Any):
    with pytest.raises(VLLMValidationError, match="return_mm_embedding"):
        read_field(request(return_mm_embedding=value), ON)
    with pytest.raises(VLLMValidationError, match="encoding_format"):
        read_field(request(return_mm_embedding=True, encoding_format="hex"), ON)


def test_only_events_in_which_a_choice_finishes_are_touched():
    running = 'data: {"choices": [{"index": 0, "finish_reason": null}]}\n\n'
    for event in (running, "data: [DONE]\n\n", ": ping\n\n", 'data: {"choices": []}\n\n'):
        assert add_to_event(event, {0: {"data": "x"}}) == event
    finished = 'data: {"choices": [{"index": 1, "finish_reason": "stop", "text": "é"}]}\n\n'
    changed = add_to_event(finished, {0: None, 1: {"data": "x"}})
    assert changed.endswith("\n\n")
    (choice,) = json.loads(changed.removeprefix("data: "))["choices"]
    assert choice == {
        "index": 1,
        "finish_reason": "stop",
        "text": "é",
        "mm_embedding": {"data": "x"},
    }


@pytest.mark.parametrize(
    ("extend", "module"),
    [
        (openai_api._extend_chat, chat_serving),
        (openai_api._extend_batch, batch_serving),
        (openai_api._extend_completion, completion_serving),
    ],
    ids=["chat", "batch", "completion"],
)
def test_wrapped_once(extend: Any, module: ModuleType):
    openai_api.install()
    names = [name for name in vars(module) if name.startswith("OpenAIServing")]
    before = {name: dict(vars(getattr(module, name))) for name in names}
    extend(module)
    assert {name: dict(vars(getattr(module, name))) for name in names} == before

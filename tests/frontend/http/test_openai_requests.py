# SPDX-License-Identifier: Apache-2.0
"""The field of HTTP requests becomes a choice that the engine is told."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.frontend.http.openai_requests import exchange_for, parse_if_asking

KEY = "return_mm_embedding"
ON = SpyreSettings(enable_return_mm_embedding=True, max_mm_embedding_response_bytes=1000)
OFF = SpyreSettings()


def extra_args(settings: SpyreSettings = ON, /, batch: int = 0, **fields: Any) -> Any:
    """What the engine is told of a chat with these fields, or of each of a batch."""
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    body = {"messages": [messages] * batch if batch else messages, **fields}
    exchange = exchange_for(parse_if_asking(json.dumps(body).encode()))
    chat = ChatCompletionRequest.model_validate({"messages": messages, **fields})
    given = chat.to_sampling_params(8, {})
    before = given.extra_args
    params, _ = exchange.begin(given, settings)
    assert given.extra_args is before, "the parameters that were given stay as they are"
    return params.extra_args


def test_without_the_field_nothing_is_returned():
    assert extra_args() == {"return_mm_embedding": False}


def test_an_engine_without_embeddings_sees_requests_as_they_came():
    assert extra_args(OFF) is None


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
    choice = extra_args(**fields)[KEY]
    assert choice["max_bytes"] == 1000
    assert choice["pooling"] == ("image" if "pooling" in str(fields) else "raw")
    assert choice["encoding_format"] == fields.get("encoding_format", "base64")


@pytest.mark.parametrize(("given", "limit"), [(10, 10), (5000, 1000)])
def test_a_limit_of_the_clients_is_not_raised(given: int, limit: int):
    assert extra_args(return_mm_embedding={"max_bytes": given})[KEY]["max_bytes"] == limit


@pytest.mark.parametrize(("n", "limit"), [(1, 1000), (4, 250), (5000, 1)])
def test_the_answers_of_a_response_share_its_limit(n: int, limit: int):
    assert extra_args(return_mm_embedding=True, n=n)[KEY]["max_bytes"] == limit


def test_the_requests_of_a_batch_share_its_limit():
    assert extra_args(return_mm_embedding=True, batch=8)[KEY]["max_bytes"] == 125


@pytest.mark.parametrize("fields", [{"return_mm_embedding": True}, {"vllm_xargs": {KEY: 1}}])
@pytest.mark.parametrize("true", [True, 1, "true"])
def test_a_beam_search_returns_none(fields: dict[str, Any], true: Any):
    with pytest.raises(VLLMValidationError, match="not returned with use_beam_search"):
        extra_args(use_beam_search=true, **fields)
    assert extra_args(use_beam_search=True, return_mm_embedding=False) == {KEY: False}
    assert extra_args(use_beam_search="false", **fields)[KEY]["pooling"] == "raw"


def test_declining():
    assert extra_args(return_mm_embedding=False) == {"return_mm_embedding": False}


@pytest.mark.parametrize("value", ["yes", {"pooling": "median"}, 7])
def test_what_there_is_not(value: Any):
    with pytest.raises(VLLMValidationError, match="return_mm_embedding"):
        extra_args(return_mm_embedding=value)
    with pytest.raises(VLLMValidationError, match="encoding_format"):
        extra_args(return_mm_embedding=True, encoding_format="hex")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {KEY: st.just(True) | st.dictionaries(st.text() | st.just("pooling"), JSON) | JSON},
        optional={name: JSON for name in ("messages", "n", "use_beam_search", "encoding_format")},
    )
)
def test_any_json_is_a_choice_or_refused(body: dict[str, Any]):
    request = parse_if_asking(json.dumps(body).encode())
    assert request is not None
    with contextlib.suppress(VLLMValidationError):
        exchange = exchange_for(request)
        assert (exchange.choice is None) == (body[KEY] in (None, False, 0))

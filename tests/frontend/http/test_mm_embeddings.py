# SPDX-License-Identifier: Apache-2.0
"""``/v1/mm_embeddings`` refuses whatever is no request, before anything is rendered."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from vllm_spyre_mm.frontend.http.exchange import EXCHANGE
from vllm_spyre_mm.frontend.http.middleware import EmbeddingMiddleware
from vllm_spyre_mm.frontend.http.mm_embeddings import router


class Serving:
    """Takes what a chat server is handed, and answers 404."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def create_chat_completion(self, request: Any, raw_request: Any) -> ErrorResponse:
        exchange = EXCHANGE.get()
        assert exchange is not None
        self.asked.append((request, exchange.choice))
        return ErrorResponse(error=ErrorInfo(message="no model", type="NotFoundError", code=404))


@pytest.fixture(scope="module")
def serving() -> Serving:
    return Serving()


@pytest.fixture(scope="module")
def client(serving: Serving) -> Iterator[TestClient]:
    """Of the route alone, with vLLM's own handling of errors; what is no refusal is raised."""
    app = FastAPI()
    app.add_middleware(EmbeddingMiddleware)
    app.include_router(router)
    init_exception_handler(app)
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.openai_serving_chat = serving
    with TestClient(app) as client:
        yield client


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
PART = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["image_url", "input_image", "image_embeds", "video_url", "text"])
        | JSON
    },
    optional={
        "image_url": st.fixed_dictionaries({"url": st.text() | JSON}) | JSON,
        "image_embeds": st.text() | JSON,
        "uuid": JSON,
    },
)
BODY = st.fixed_dictionaries(
    {"input": st.lists(PART | JSON, max_size=3) | JSON},
    optional={
        "model": st.text() | JSON,
        "return_mm_embedding": st.fixed_dictionaries({"pooling": st.just("image")}) | JSON,
        "encoding_format": st.sampled_from(["base64", "float"]) | JSON,
        "x": JSON,
    },
)


@given(BODY | JSON)
def test_any_json_is_refused_or_handed_on_as_a_chat(
    client: TestClient, serving: Serving, body: Any
):
    serving.asked.clear()
    content = json.dumps(body)
    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/mm_embeddings", content=content, headers=headers)
    assert 400 <= response.status_code < 500
    said = response.json()
    assert said["error"]["message"]
    assert bool(serving.asked) == (response.status_code == 404)
    for request, choice in serving.asked:
        assert choice is not None
        assert not choice.generate
        assert request.max_tokens == 1


@given(st.binary(max_size=40))
def test_bytes_that_are_no_json_are_refused(client: TestClient, content: bytes):
    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/mm_embeddings", content=content, headers=headers)
    assert 400 <= response.status_code < 500


@pytest.mark.parametrize("choice", ["yes", 2, {"generate": "false"}, {"generate": None}, False])
def test_a_choice_that_there_is_not(client: TestClient, serving: Serving, choice: Any):
    """Also one that another reader would take for a choice."""
    serving.asked.clear()
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    body = {"input": [part], "return_mm_embedding": choice}
    response = client.post("/v1/mm_embeddings", json=body)
    assert response.status_code == 400
    assert "return_mm_embedding" in response.json()["error"]["message"]
    assert not serving.asked

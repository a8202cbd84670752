# SPDX-License-Identifier: Apache-2.0
"""Routes that return no embedding refuse to be asked; others write it while it is sent."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from vllm_spyre_mm.frontend.http.exchange import EXCHANGE, PendingEmbeddings
from vllm_spyre_mm.frontend.http.middleware import EmbeddingMiddleware
from vllm_spyre_mm.frontend.http.openai_requests import parse_if_asking

PIECES = 40


def text(taken: list[int] | None = None, count: int = PIECES) -> Iterator[bytes]:
    """A list of numbers, a piece at a time; ``taken`` notes which were made."""
    for number in range(count):
        if taken is not None:
            taken.append(number)
        yield f"{'[' if number == 0 else ','}{number}{']' if number == count - 1 else ''}".encode()


def pending_embeddings() -> PendingEmbeddings:
    """Of the request that is served."""
    exchange = EXCHANGE.get()
    assert exchange is not None
    return exchange.pending


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(EmbeddingMiddleware)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        pending = pending_embeddings()
        if (await request.json()).get("stream"):
            events = [f"data: {json.dumps({'e': pending.add(text())})}\n\n" for _ in range(2)]

            async def send() -> Any:
                for event in ("data: {}\n\n", *events, "data: [DONE]\n\n"):
                    yield event

            return StreamingResponse(send(), media_type="text/event-stream")
        return JSONResponse({"first": pending.add(text()), "é": [pending.add(text()), None]})

    @app.post("/v1/anything")
    async def anything(request: Request) -> Any:
        assert not pending_embeddings()
        return await request.json()

    return app


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server")


def post(app: FastAPI, path: str, body: Any, **more: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with client_of(app) as client:
            headers = {"content-type": "application/json"}
            return await client.post(path, content=json.dumps(body), headers=headers, **more)

    return asyncio.run(ask())


def test_what_stands_for_an_embedding_is_replaced_by_it(app: FastAPI) -> None:
    response = post(app, "/v1/chat/completions", {})
    numbers = list(range(PIECES))
    assert response.json() == {"first": numbers, "é": [numbers, None]}
    assert "content-length" not in response.headers


def test_in_events_of_a_stream_too(app: FastAPI) -> None:
    events = post(app, "/v1/chat/completions", {"stream": True}).text.split("\n\n")
    numbers = list(range(PIECES))
    assert [json.loads(each.removeprefix("data: ")) for each in events[:3]] == [
        {},
        {"e": numbers},
        {"e": numbers},
    ]
    assert events[3:] == ["data: [DONE]", ""]


def test_what_looks_like_it_is_left_alone() -> None:
    pending = PendingEmbeddings()
    body = b'{"text": "mm_embedding:' + b"0" * 32 + b'"}'
    assert b"".join(pending.fill(body)) == body


def test_the_event_loop_has_a_turn_after_each_piece_of_all_responses() -> None:
    """However many responses are written at once: a turn has one piece."""
    taken: list[int] = []
    turns_with: list[int] = []
    responses = 5

    async def app(scope: Any, receive: Any, send: Any) -> None:
        pending = pending_embeddings()
        body = json.dumps({"e": pending.add(text(taken))}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def watch() -> None:
        while len(taken) < responses * PIECES:
            before = len(taken)
            await asyncio.sleep(0)
            turns_with.append(len(taken) - before)

    async def serve() -> None:
        async with client_of(EmbeddingMiddleware(app)) as client:  # type: ignore[arg-type]
            asked = [client.post("/v1/chat/completions", json={}) for _ in range(responses)]
            *answers, _ = await asyncio.gather(*asked, watch())
        assert all(answer.json() == {"e": list(range(PIECES))} for answer in answers)

    asyncio.run(serve())
    assert max(turns_with) == 1


def test_nothing_is_encoded_for_a_client_that_is_gone() -> None:
    taken: list[int] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        pending = pending_embeddings()
        body = json.dumps({"e": pending.add(text(taken, 100_000))}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def receive() -> Any:
        while len(sent) < 10:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(EmbeddingMiddleware(app)(scope, receive, send))
    assert len(taken) < 20


@pytest.mark.parametrize(
    "body",
    [
        {"return_mm_embedding": True},
        {"return_mm_embedding": {"pooling": "image"}, "input": "x"},
        {"vllm_xargs": {"return_mm_embedding": 1}},
        {"sampling_params": {"extra_args": {"return_mm_embedding": True}}},
    ],
    ids=str,
)
def test_a_route_that_returns_none_says_so(app: FastAPI, body: Any) -> None:
    response = post(app, "/v1/anything", body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert "/v1/anything returns no embedding: ask /v1/chat/completions" in error["message"]
    assert error["param"] == "return_mm_embedding"


@pytest.mark.parametrize(
    "choice",
    ["yes", {"pooling": "median"}, {"\ud800": 1}, {"encoding_format": "\ud800"}],
    ids=ascii,
)
def test_a_choice_that_there_is_not_is_refused_before_the_route(app: FastAPI, choice: Any) -> None:
    response = post(app, "/v1/chat/completions", {"return_mm_embedding": choice})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "return_mm_embedding"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"return_mm_embedding": False, "vllm_xargs": {"return_mm_embedding": 0}},
        {"messages": [{"content": 'say "return_mm_embedding": true'}], "vllm_xargs": None},
        ["return_mm_embedding"],
        {"long": "x" * 200_000, "sampling_params": ["return_mm_embedding"]},
    ],
    ids=lambda body: str(body)[:40],
)
def test_who_does_not_ask_is_served_what_came(app: FastAPI, body: Any) -> None:
    response = post(app, "/v1/anything", body)
    assert (response.status_code, response.json()) == (200, body)


def test_a_body_in_parts_is_read_whole_and_handed_on(app: FastAPI) -> None:
    async def parts(whole: bytes) -> Any:
        for start in range(0, len(whole), 7):
            yield whole[start : start + 7]

    async def ask(body: Any) -> httpx.Response:
        async with client_of(app) as client:
            content = parts(json.dumps(body).encode())
            headers = {"content-type": "application/json"}
            return await client.post("/v1/anything", content=content, headers=headers)

    assert asyncio.run(ask({"a": "bcdefghijklmn"})).json() == {"a": "bcdefghijklmn"}
    assert asyncio.run(ask({"return_mm_embedding": True})).status_code == 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b'\xff"return_mm_embedding"', b'["return_mm_embedding']
)
def test_what_is_no_json_is_the_routes_to_refuse(body: bytes) -> None:
    assert parse_if_asking(body) is None
    assert parse_if_asking(b'{"return_mm_embedding":' + b"[" * 100_000) is None

# SPDX-License-Identifier: Apache-2.0
"""Embeddings in HTTP messages: what a request asks for is read, and its response gets it.

A response is made with a short placeholder for each embedding. The text that belongs there may be
hundreds of megabytes, so it is encoded while the response is sent: a piece at a time, as fast as
the client reads, and never more than one piece between two turns of the event loop. Whatever is
asked for, other requests wait for a few milliseconds. A response to a request that does not ask is
sent on as it comes.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_spyre_mm.frontend.http.exchange import EXCHANGE, Exchange
from vllm_spyre_mm.frontend.http.openai_requests import (
    asks_anywhere,
    exchange_for,
    parse_if_asking,
)
from vllm_spyre_mm.frontend.http.openai_responses import (
    add_to_events,
    add_to_models,
    add_to_response,
)
from vllm_spyre_mm.multimodal.embedding_choice import EXTRA_ARG

if TYPE_CHECKING:
    from vllm.exceptions import VLLMValidationError

CHAT, BATCH, COMPLETIONS, IMAGES, MODELS = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/mm_embeddings",
    "/v1/models",
)
ROUTES = (CHAT, BATCH, COMPLETIONS, IMAGES, "/invocations")
"""Those that return embeddings. (SageMaker's hands its requests to the others.)"""


class EmbeddingMiddleware:
    """Reads what requests ask for, refuses what their route does not return, writes the responses.

    Args:
        app: what serves the requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._turn = asyncio.Lock()  # of the one response that encodes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["method"] == "POST":
            await self._serve(scope, receive, send)
        elif scope["method"] == "GET" and scope["path"].endswith(MODELS):
            vllm_config = scope["app"].state.vllm_config
            editing = _Editing(send, whole=lambda body: add_to_models(body, vllm_config))
            await self.app(scope, receive, editing)
        else:
            await self.app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        from vllm.exceptions import VLLMValidationError

        messages = await _whole_body(scope, receive)
        body = b"".join(message.get("body", b"") for message in messages)
        receive = _replaying(messages, receive)
        try:
            exchange = _exchange(scope["path"], body)
        except VLLMValidationError as error:
            await _error_response(error)(scope, receive, send)
            return
        del body  # it may be long, and is the route's to keep
        reset = EXCHANGE.set(exchange)
        try:
            await self.app(scope, receive, self._answering(exchange, receive, send))
        finally:
            EXCHANGE.reset(reset)

    def _answering(self, exchange: Exchange, receive: Receive, send: Send) -> Send:
        """What sends a response with its embeddings."""

        async def filling(message: Message) -> None:
            if not exchange.pending:
                await send(message)
            elif message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["content-length"]  # known when it is sent
                await send(message)
            else:
                async with _watching(receive) as gone:
                    await self._write(exchange.pending.fill(message.get("body", b"")), gone, send)
                await send({**message, "body": b""})

        if exchange.choice is None:  # or the route chooses, and puts it into its response itself
            return filling
        return _Editing(
            filling,
            whole=lambda body: add_to_response(body, exchange.value),
            events=lambda body: add_to_events(body, exchange.value),
        )

    async def _write(self, pieces: Iterator[bytes], gone: "asyncio.Task[None]", send: Send) -> None:
        """Send what ``pieces`` yields, until the client is gone."""
        while not gone.done():
            async with self._turn:
                piece = next(pieces, None)
                await asyncio.sleep(0)  # with the lock: a turn of the loop has one piece
            if piece is None:
                return
            await send({"type": "http.response.body", "body": piece, "more_body": True})


class _Editing:
    """Sends a response with another body.

    Args:
        send: what it is sent with.
        whole: makes the new body of a response of JSON, which is sent when it is whole.
        events: makes the new text of server-sent events, which are sent as they come.
    """

    def __init__(
        self,
        send: Send,
        whole: Callable[[bytes], bytes],
        events: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self._send, self._whole, self._events = send, whole, events
        self._start: Message | None = None  # of a response that is not whole yet
        self._parts: list[bytes] = []
        self._is_stream = False

    async def __call__(self, message: Message) -> None:
        """Send one message of the response, or keep it."""
        if message["type"] == "http.response.start":
            content_type = Headers(raw=message.get("headers", [])).get("content-type", "")
            self._is_stream = content_type.startswith("text/event-stream")
            if "json" in content_type:
                self._start = message
            else:
                await self._send(message)
        elif self._start is not None:
            self._parts.append(message.get("body", b""))
            if not message.get("more_body"):
                body = self._whole(b"".join(self._parts))
                MutableHeaders(scope=self._start)["content-length"] = str(len(body))
                await self._send(self._start)
                await self._send({**message, "body": body})
        elif self._is_stream and self._events is not None:
            await self._send({**message, "body": self._events(message.get("body", b""))})
        else:
            await self._send(message)


@asynccontextmanager
async def _watching(receive: Receive) -> "AsyncIterator[asyncio.Task[None]]":
    """A task that is done when the client closes its connection."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass  # what is left of the request

    gone = asyncio.create_task(disconnected())
    try:
        yield gone
    finally:
        gone.cancel()


def _exchange(path: str, body: bytes) -> Exchange:
    """What a request asks for.

    Raises:
        VLLMValidationError: what there is not, or what its route does not return (HTTP 400).
    """
    from vllm.exceptions import VLLMValidationError

    if path.endswith(IMAGES):
        return Exchange()  # its fields are its own
    request = parse_if_asking(body)
    if path.endswith(ROUTES):
        return exchange_for(request)
    if asks_anywhere(request):
        raise VLLMValidationError(
            f"return_mm_embedding is asked for, and {path} returns no embedding: ask {CHAT}, "
            f"{BATCH} or {IMAGES}",
            parameter=EXTRA_ARG,
        )
    return Exchange()


async def _whole_body(scope: Scope, receive: Receive) -> deque[Message]:
    """The messages of a request with a JSON body; none of another, which is not read."""
    if "json" not in Headers(scope=scope).get("content-type", ""):
        return deque()
    messages = deque([await receive()])
    while messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def _replaying(messages: deque[Message], receive: Receive) -> Receive:
    """What gives ``messages`` first, and keeps none that it gave."""

    async def replay() -> Message:
        return messages.popleft() if messages else await receive()

    return replay


def _error_response(error: "VLLMValidationError") -> JSONResponse:
    """As vLLM's routes answer it."""
    from vllm.entrypoints.serve import create_error_response

    response = create_error_response(error)
    return JSONResponse(response.model_dump(), status_code=response.error.code)

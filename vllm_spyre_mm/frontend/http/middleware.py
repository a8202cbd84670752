# SPDX-License-Identifier: Apache-2.0
"""Embeddings in HTTP messages: which routes return them, and how they are written into a response.

A response is made with a short placeholder for each embedding. The text that belongs there may be
hundreds of megabytes, so it is encoded while the response is sent: a piece at a time, as fast as
the client reads, and never more than one piece between two turns of the event loop. Whatever is
asked for, other requests wait for a few milliseconds.
"""

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_spyre_mm.multimodal.embedding import EXTRA_ARG

CHAT, BATCH, COMPLETIONS, IMAGES = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/mm_embeddings",
)
ROUTES = (CHAT, BATCH, COMPLETIONS, IMAGES, "/invocations")
"""Those that return embeddings. (SageMaker's hands its requests to the others.)"""

_PLACEHOLDER = re.compile(rb'"mm_embedding:([0-9a-f]{32})"')


class PendingEmbeddings:
    """The embeddings of one response that are still to be written into it."""

    def __init__(self) -> None:
        self._texts: dict[bytes, Iterator[bytes]] = {}

    def __bool__(self) -> bool:
        return bool(self._texts)

    def add(self, text: Iterator[bytes]) -> str:
        """Keep an embedding for later.

        Args:
            text: pieces of its JSON.

        Returns:
            The value that stands for it in the response.
        """
        name = secrets.token_hex(16)
        self._texts[name.encode()] = text
        return f"mm_embedding:{name}"

    def fill(self, body: bytes) -> Iterator[bytes]:
        """Pieces of ``body`` with the embeddings in place of what stands for them."""
        end = 0
        for match in _PLACEHOLDER.finditer(body):
            text = self._texts.pop(match[1], None)
            if text is not None:
                yield body[end : match.start()]
                yield from text
                end = match.end()
        yield body[end:]


PENDING: ContextVar[PendingEmbeddings | None] = ContextVar("pending_embeddings", default=None)
"""Of the request that is served in this context; None where no middleware writes its response."""


class EmbeddingMiddleware:
    """Refuses requests for embeddings that their route does not return, and writes the others'.

    Args:
        app: what serves the requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._turn = asyncio.Lock()  # of the one response that encodes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
        elif scope["path"].endswith(ROUTES):
            await self._serve(scope, receive, send)
        else:
            messages = await _whole_body(scope, receive)
            if asks_for_embedding(b"".join(message.get("body", b"") for message in messages)):
                await _refusal(scope["path"])(scope, receive, send)
            else:
                await self.app(scope, _replaying(messages, receive), send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        pending = PendingEmbeddings()

        async def filling(message: Message) -> None:
            if not pending:
                await send(message)
            elif message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["content-length"]  # known when it is sent
                await send(message)
            else:
                async with _watching(receive) as gone:
                    await self._write(pending.fill(message.get("body", b"")), gone, send)
                await send({**message, "body": b""})

        reset = PENDING.set(pending)
        try:
            await self.app(scope, receive, filling)
        finally:
            PENDING.reset(reset)

    async def _write(self, pieces: Iterator[bytes], gone: "asyncio.Task[None]", send: Send) -> None:
        """Send what ``pieces`` yields, until the client is gone."""
        while not gone.done():
            async with self._turn:
                piece = next(pieces, None)
                await asyncio.sleep(0)  # with the lock: a turn of the loop has one piece
            if piece is None:
                return
            await send({"type": "http.response.body", "body": piece, "more_body": True})


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


def asks_for_embedding(body: bytes) -> bool:
    """Whether a request says that it wants an embedding, where vLLM's routes have such fields."""
    if EXTRA_ARG.encode() not in body:
        return False
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return False  # the route says what is wrong with it
    parameters = _field(request, "sampling_params")
    places = (request, _field(request, "vllm_xargs"), _field(parameters, "extra_args"))
    return any(_field(place, EXTRA_ARG) not in (None, False) for place in places)


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


async def _whole_body(scope: Scope, receive: Receive) -> list[Message]:
    """The messages of a request with a JSON body; none of another, which is not read."""
    if "json" not in Headers(scope=scope).get("content-type", ""):
        return []
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def _replaying(messages: list[Message], receive: Receive) -> Receive:
    """What gives ``messages`` first."""
    waiting = iter(messages)

    async def replay() -> Message:
        return next(waiting, None) or await receive()

    return replay


def _refusal(path: str) -> JSONResponse:
    from vllm.entrypoints.serve import create_error_response
    from vllm.exceptions import VLLMValidationError

    error = create_error_response(
        VLLMValidationError(
            f"return_mm_embedding is asked for, and {path} returns no embedding: ask {CHAT}, "
            f"{BATCH} or {IMAGES}",
            parameter=EXTRA_ARG,
        )
    )
    return JSONResponse(error.model_dump(), status_code=error.error.code)

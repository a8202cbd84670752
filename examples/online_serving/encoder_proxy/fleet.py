# SPDX-License-Identifier: Apache-2.0
"""What the proxy asks of the servers behind it."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from dataclasses import asdict, dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar

import httpx
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pictures import encode_requests
from server import Server, ranked
from starlette.types import Receive, Scope, Send

logger = logging.getLogger("encoder_proxy")

Result = TypeVar("Result")

Headers = list[tuple[bytes, bytes]]
"""Names and values as they came: a value may have bytes that are not ASCII."""

CONNECT_SECONDS = 5.0

UNAVAILABLE = frozenset({502, 503, 504})
"""Statuses of a server that takes no requests now, as one that shuts down."""

REFUSED = frozenset({400, 413, 422})
"""Statuses of a request with which every server finds the same fault."""

OF_ONE_CONNECTION = frozenset(
    b"connection content-length expect host keep-alive te trailer transfer-encoding upgrade".split()
)
"""Headers that are not passed on."""

OF_THE_DECODER = frozenset({b"x-data-parallel-rank"})
"""Headers that encoders are not given: they may have fewer engines."""

KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
]
"""Breaks the connection to a host that is gone after a minute, also while a request is sent."""


@dataclass(frozen=True)
class Settings:
    """What can be set; all are above zero.

    Attributes:
        encode_seconds: that an encoder has for a picture.
        max_body_bytes: of a request.
        max_pictures: of a chat that are encoded ahead; one with more goes straight to a decoder.
        encodes_at_once: of one chat.
        check_seconds: between two looks at a server's health.
        health_seconds: that a server has to say that it is healthy.
        rest_seconds: that a server which failed comes after all others.
    """

    encode_seconds: float = 60.0
    max_body_bytes: int = 64 << 20
    max_pictures: int = 64
    encodes_at_once: int = 8
    check_seconds: float = 2.0
    health_seconds: float = 4.0
    rest_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} has to be above zero and is {value}")


async def unless(
    work: Coroutine[Any, Any, Result], stop: Coroutine[Any, Any, None]
) -> Result | None:
    """The result of `work`; None if `stop` ends first, which cancels `work`."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop)
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else stopping.result()
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


def own_error(status: int, message: str) -> Response:
    """An error that no server has given."""
    return JSONResponse({"error": {"message": message, "code": status}}, status)


def _passed_on(
    headers: Iterable[tuple[bytes, bytes]], without: frozenset[bytes] = frozenset()
) -> Headers:
    """Headers without those of one connection and others."""
    lowered = [(name.lower(), value) for name, value in headers]
    return [each for each in lowered if each[0] not in OF_ONE_CONNECTION | without]


class Answer(StreamingResponse):
    """A decoder's answer, piece by piece.

    Args:
        answer: of which the headers have come.
        server: that gives it.
        stack: closes it, however its way to the client ends.
    """

    def __init__(
        self, answer: httpx.Response, server: Server, stack: contextlib.AsyncExitStack
    ) -> None:
        super().__init__(self._pieces(answer, server), answer.status_code)
        self.raw_headers += _passed_on(answer.headers.raw)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)

    @staticmethod
    async def _pieces(answer: httpx.Response, server: Server) -> AsyncIterator[bytes]:
        """As they come; the client's connection breaks where the decoder's does."""
        try:
            async for piece in answer.aiter_raw():
                yield piece
        except httpx.RequestError as error:
            server.failed(repr(error))
            raise


class Fleet:
    """The servers, and the connections to them.

    Args:
        encoders: their addresses.
        decoders: theirs.
        settings: of the proxy.
    """

    def __init__(
        self, encoders: Sequence[str], decoders: Sequence[str], settings: Settings
    ) -> None:
        self.encoders = [Server(address, settings.rest_seconds) for address in encoders]
        self.decoders = [Server(address, settings.rest_seconds) for address in decoders]
        self.settings = settings
        self.client = httpx.AsyncClient(
            # Without a limit for answers: a decoder takes its time.
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            transport=httpx.AsyncHTTPTransport(
                # Shorter than the 5 seconds after which vLLM closes a connection without requests.
                limits=httpx.Limits(max_keepalive_connections=256, keepalive_expiry=2),
                socket_options=KEEPALIVE,
            ),
            # A server's cookies are for its client, and for no other.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )
        self.client.headers.clear()  # a request has those of its client alone

    # -- pictures ---------------------------------------------------------------------------------

    async def encode_all(self, request: Request, body: bytes) -> None:
        """Have the pictures of a chat encoded, several at once."""
        asked = encode_requests(body)
        if len(asked) > self.settings.max_pictures:
            logger.warning("a chat of %d pictures is left to a decoder", len(asked))
            return
        headers = _passed_on(request.headers.raw, OF_THE_DECODER)
        turns = asyncio.Semaphore(self.settings.encodes_at_once)

        async def encode(picture: str, content: bytes) -> bool:
            async with turns:
                return await self._encode(picture, content, headers)

        answered = await asyncio.gather(*(encode(*each) for each in asked.items()))
        if not all(answered):
            logger.warning("no encoder takes %d pictures of a chat", answered.count(False))

    async def _encode(self, picture: str, content: bytes, headers: Headers) -> bool:
        """Ask one encoder after the other.

        Returns:
            Whether one has encoded the picture, or finds a fault with it.
        """
        timeout = httpx.Timeout(self.settings.encode_seconds, connect=CONNECT_SECONDS)
        for server in ranked(self.encoders, picture):
            url = f"{server.address}/v1/chat/completions"
            asking = self.client.post(url, content=content, headers=headers, timeout=timeout)
            try:
                with server.working():
                    answer = await unless(asking, server.goes_down())
            except httpx.RequestError as error:
                server.failed(repr(error))
                continue
            if answer is None:  # the server is down
                continue
            if answer.status_code == 200:
                return True
            if answer.status_code in UNAVAILABLE:
                server.failed(f"HTTP {answer.status_code}: {answer.text[:200]}")
                continue
            server.refused(answer)
            if answer.status_code in REFUSED:
                return True  # the decoder finds it too, and its words are the answer
        return False

    # -- requests ---------------------------------------------------------------------------------

    async def decode(self, request: Request, body: bytes) -> Response:
        """A decoder's answer; one that fails before its first piece is replaced."""
        refusal = own_error(503, "no decoder answers")
        for server in sorted(self.decoders, key=_after_others):
            try:
                async with contextlib.AsyncExitStack() as stack:
                    stack.enter_context(server.working())
                    answer = await stack.enter_async_context(self._stream(server, request, body))
                    if answer.status_code not in UNAVAILABLE:
                        return Answer(answer, server, stack.pop_all())
                    content = b"".join([piece async for piece in answer.aiter_raw()])
            except httpx.RequestError as error:
                server.failed(repr(error))
                continue
            server.failed(f"HTTP {answer.status_code}: {content[:200]!r}")
            refusal = Response(content, answer.status_code)
            refusal.raw_headers += _passed_on(answer.headers.raw)
        return refusal

    def _stream(
        self, server: Server, request: Request, body: bytes
    ) -> contextlib.AbstractAsyncContextManager[httpx.Response]:
        target = request.scope["raw_path"]
        if query := request.scope["query_string"]:
            target += b"?" + query
        return self.client.stream(
            request.method,
            httpx.URL(server.address).copy_with(raw_path=target),
            content=body,
            headers=_passed_on(request.headers.raw),
        )

    # -- health -----------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look at every server again and again."""
        await asyncio.gather(*map(self._watch, [*self.encoders, *self.decoders]))

    async def _watch(self, server: Server) -> None:
        while True:
            try:
                url, seconds = f"{server.address}/health", self.settings.health_seconds
                answer = await self.client.get(url, timeout=seconds)
                server.checked(answer.status_code == 200)
            except httpx.RequestError:
                server.checked(False)
            await asyncio.sleep(self.settings.check_seconds)


def _after_others(decoder: Server) -> tuple[bool, bool, int]:
    """Where a decoder comes: those that are up first, and of these the one with the least work."""
    return decoder.down.is_set(), decoder.rests, decoder.requests

# SPDX-License-Identifier: Apache-2.0
"""One address for servers that encode pictures and servers that decode.

A chat's pictures go to the encoders first, each picture to the one that its hash ranks highest, so
that the same picture meets the same cache; then the chat goes to the decoder with the fewest
requests, which finds the features where the encoders have put them. An encoder that fails is
passed over, and its pictures go to the next in their ranking; what no encoder has encoded, the
decoder encodes. Start the servers (docs/scaling.md says how) and then:

    python encoder_proxy.py --encoder http://a:8000 --encoder http://b:8000 \\
        --decoder http://c:8000 --port 9000
"""

import argparse
import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

logger = logging.getLogger("encoder_proxy")

CHECK_SECONDS = 2.0
"""Between two looks at a server's health."""

DECIDES_FEATURES = ("model", "mm_processor_kwargs", "media_io_kwargs")
"""Fields of a chat that decide how a picture is encoded."""

NOT_PASSED_ON = frozenset({"host", "content-length", "transfer-encoding", "connection"})
"""Headers of one connection."""


@dataclass(eq=False)
class Server:
    """A server behind the proxy.

    Attributes:
        address: without a path.
        healthy: whether it answered last.
        requests: that it works on for this proxy.
    """

    address: str
    healthy: bool = True
    requests: int = 0

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Count a request."""
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def failed(self, error: Exception) -> None:
        """Pass it over until it is healthy again."""
        logger.warning("%s failed: %s: %s", self.address, type(error).__name__, error)
        self.healthy = False


class ServerError(Exception):
    """A server answered with a status of 500 or above."""


def ranked(servers: Sequence[Server], picture: str) -> list[Server]:
    """Servers in a picture's own order (rendezvous hashing), healthy ones first.

    A server that comes or goes changes the first place of the pictures that are its own alone.
    """

    def weight(server: Server) -> bytes:
        return hashlib.sha256(f"{server.address} {picture}".encode()).digest()

    order = sorted(servers, key=weight, reverse=True)
    return sorted(order, key=lambda server: not server.healthy)


def pictures_of(body: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts of a chat that hold pictures, each once, by the hash of its URL or content."""
    found: dict[str, dict[str, Any]] = {}
    for message in _dicts(body.get("messages")):
        for part in _dicts(message.get("content")):
            if part.get("type") == "image_url":
                image = part.get("image_url")
                url = image.get("url") if isinstance(image, dict) else image
                found[hashlib.sha256(str(url).encode()).hexdigest()] = part
    return found


def _dicts(value: Any) -> list[dict[str, Any]]:
    """What of a list are objects: a client may have sent anything."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


class Fleet:
    """The servers, and the connections to them."""

    def __init__(self, encoders: Sequence[str], decoders: Sequence[str]) -> None:
        self.encoders = [Server(address) for address in encoders]
        self.decoders = [Server(address) for address in decoders]
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self.client = httpx.AsyncClient(timeout=httpx.Timeout(600, connect=5), limits=limits)

    # -- pictures ---------------------------------------------------------------------------------

    async def encode_all(self, body: dict[str, Any], headers: dict[str, str]) -> None:
        """Have each picture of a chat encoded, all at once."""
        pictures = pictures_of(body)
        await asyncio.gather(
            *(self._encode(body, headers, picture, part) for picture, part in pictures.items())
        )

    async def _encode(
        self, body: dict[str, Any], headers: dict[str, str], picture: str, part: dict[str, Any]
    ) -> None:
        only = {
            "messages": [{"role": "user", "content": [part]}],
            "max_tokens": 1,
            **{name: body[name] for name in DECIDES_FEATURES if name in body},
        }
        for server in ranked(self.encoders, picture):
            try:
                with server.working():
                    response = await self.client.post(
                        f"{server.address}/v1/chat/completions", json=only, headers=headers
                    )
                if response.status_code >= 500:
                    raise ServerError(f"HTTP {response.status_code}: {response.text[:200]}")
            except (httpx.TransportError, ServerError) as error:
                server.failed(error)
                continue
            return  # what it refuses, the decoder refuses too, and its words are the answer
        logger.warning("no encoder has encoded a picture: the decoder does")

    # -- chats ------------------------------------------------------------------------------------

    async def decode(self, request: Request, body: bytes, headers: dict[str, str]) -> Response:
        """A decoder's answer, piece by piece; one that fails before its first piece is replaced."""
        for server in sorted(self.decoders, key=lambda each: (not each.healthy, each.requests)):
            stack = contextlib.AsyncExitStack()
            stack.enter_context(server.working())
            url = httpx.URL(server.address).copy_with(
                path=request.url.path, query=request.url.query.encode() or None
            )
            try:
                answer = await stack.enter_async_context(
                    self.client.stream(request.method, url, content=body, headers=headers)
                )
            except httpx.TransportError as error:
                await stack.aclose()
                server.failed(error)
                continue
            kept = {
                name: value
                for name, value in answer.headers.items()
                if name.lower() not in NOT_PASSED_ON
            }
            return StreamingResponse(
                _pieces(answer, stack, server), status_code=answer.status_code, headers=kept
            )
        return JSONResponse({"error": {"message": "no decoder answers", "code": 503}}, 503)

    # -- health -----------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look at every server again and again."""
        while True:
            await asyncio.gather(*map(self._look_at, [*self.encoders, *self.decoders]))
            await asyncio.sleep(CHECK_SECONDS)

    async def _look_at(self, server: Server) -> None:
        try:
            answer = await self.client.get(f"{server.address}/health", timeout=CHECK_SECONDS)
            server.healthy = answer.status_code == 200
        except httpx.TransportError:
            server.healthy = False


async def _pieces(
    answer: httpx.Response, stack: contextlib.AsyncExitStack, server: Server
) -> AsyncIterator[bytes]:
    """The raw pieces of an answer; the client's connection breaks where the decoder's does."""
    async with stack:
        try:
            async for piece in answer.aiter_raw():
                yield piece
        except httpx.TransportError as error:
            server.failed(error)
            raise


def make_app(fleet: Fleet) -> FastAPI:
    """The proxy's routes."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(fleet.watch())
        yield
        watching.cancel()
        await fleet.client.aclose()

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> Response:
        """Healthy as long as a decoder is: it encodes what no encoder does."""
        state = {
            name: {server.address: server.healthy for server in servers}
            for name, servers in (("encoders", fleet.encoders), ("decoders", fleet.decoders))
        }
        return JSONResponse(state, 200 if any(state["decoders"].values()) else 503)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        headers = _headers_of(request)
        with contextlib.suppress(ValueError):  # the decoder says what is wrong with it
            body = await request.json()
            if isinstance(body, dict):
                await fleet.encode_all(body, headers)
        return await fleet.decode(request, await request.body(), headers)

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def other(request: Request, path: str) -> Response:
        return await fleet.decode(request, await request.body(), _headers_of(request))

    return app


def _headers_of(request: Request) -> dict[str, str]:
    return {name: value for name, value in request.headers.items() if name not in NOT_PASSED_ON}


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--encoder", action="append", required=True, metavar="ADDRESS")
    parser.add_argument("--decoder", action="append", required=True, metavar="ADDRESS")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    fleet = Fleet(options.encoder, options.decoder)
    uvicorn.run(make_app(fleet), host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""One address for servers that encode pictures and servers that decode.

A chat's pictures go to the encoders first, each picture to the one that its hash ranks highest, so
that the same picture meets the same cache; then the chat goes to the decoder with the fewest
requests, which finds the features where the encoders have put them. An encoder that fails is
passed over, and its pictures go to the next in their ranking; what no encoder has encoded, the
decoder encodes. Start the servers (docs/scaling.md says how) and then:

    python proxy.py --encoder http://a:8000 --encoder http://b:8000 \\
        --decoder http://c:8000 --port 9000
"""

import argparse
import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fleet import Fleet, Settings, own_error, unless
from starlette.requests import ClientDisconnect

CLIENT_HAS_LEFT = 499
"""The status of an answer that nobody reads."""

SETTINGS = {
    "encode_seconds": "that an encoder has for a picture, before the next one is asked",
    "encodes_at_once": "pictures of one chat that are encoded at once",
    "max_pictures": "of a chat; one with more goes to a decoder as it is",
    "max_body_bytes": "of a request; a larger one is answered with HTTP 413",
}
"""What a user may set."""


def make_app(fleet: Fleet) -> FastAPI:
    """The proxy's routes."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(fleet.watch())
        yield
        watching.cancel()
        await fleet.client.aclose()

    # Without pages of FastAPI's own: /docs and all other routes are the decoders'.
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)

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
        return await _answer(fleet, request, encode_ahead=True)

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def other(request: Request) -> Response:
        return await _answer(fleet, request, encode_ahead=False)

    return app


async def _answer(fleet: Fleet, request: Request, encode_ahead: bool) -> Response:
    """The fleet's answer; work for a client that has left is ended."""
    largest = fleet.settings.max_body_bytes
    try:
        body = await _body_of(request, largest)
    except ClientDisconnect:
        return Response(status_code=CLIENT_HAS_LEFT)
    if body is None:
        return own_error(413, f"a request has at most {largest} bytes (--max-body-bytes)")

    async def work() -> Response:
        if encode_ahead:
            await fleet.encode_all(request, body)
        return await fleet.decode(request, body)

    answer = await unless(work(), _client_leaves(request))
    return answer or Response(status_code=CLIENT_HAS_LEFT)


async def _body_of(request: Request, largest: int) -> bytes | None:
    """A request's body; None if it has more than `largest` bytes."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > largest:
            return None
    return bytes(body)


async def _client_leaves(request: Request) -> None:
    """Wait until a client, whose body has been read, closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def address(text: str) -> str:
    """An address that a user gives, without a slash at its end.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    with contextlib.suppress(httpx.InvalidURL):
        url = httpx.URL(text.rstrip("/"))
        if url.scheme in ("http", "https") and url.host and url.raw_path == b"/":
            return str(url)
    raise argparse.ArgumentTypeError(f"{text!r} is not like http://host:8000")


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for role, does in (("encoder", "encodes pictures"), ("decoder", "answers chats")):
        parser.add_argument(
            f"--{role}",
            type=address,
            action="append",
            required=True,
            metavar="ADDRESS",
            help=f"of a server that {does}; once for each",
        )
    parser.add_argument("--host", default="127.0.0.1", help="that the proxy listens at")
    parser.add_argument("--port", type=int, default=9000, help="that the proxy listens at")
    for name, meaning in SETTINGS.items():
        default = getattr(Settings, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=meaning)
    options = parser.parse_args()
    try:
        settings = Settings(**{name: getattr(options, name) for name in SETTINGS})
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    uvicorn.run(
        make_app(Fleet(options.encoder, options.decoder, settings)),
        host=options.host,
        port=options.port,
        log_level="warning",
        date_header=False,  # an answer has those of its decoder
        server_header=False,
    )


if __name__ == "__main__":
    main()

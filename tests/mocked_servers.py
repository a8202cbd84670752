# SPDX-License-Identifier: Apache-2.0
"""Servers that a test plays without connections, and the examples' proxy before them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
from fleet import Fleet, Settings
from proxy import make_app

ENCODERS = [f"http://encoder-{number}" for number in range(4)]
DECODERS = ["http://decoder-0", "http://decoder-1"]
CHATS = "/v1/chat/completions"

Failure = Callable[[httpx.Request], httpx.Response]


def picture(number: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"http://pictures/{number}"}}


def chat_about(*numbers: int) -> dict[str, Any]:
    content = [*map(picture, numbers), {"type": "text", "text": "What is it?"}]
    return {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 9}


def answer(status: int, text: str) -> httpx.Response:
    """An answer that comes over a connection, and is read once."""

    async def pieces() -> AsyncIterator[bytes]:
        yield text.encode()

    return httpx.Response(status, content=pieces(), headers={"From": "the server"})


class Servers:
    """Plays all servers.

    Attributes:
        asked: requests in their order, as the server's name and the body.
        failing: what servers do that do not answer with HTTP 200, by their names.
        seconds: that each answer takes.
        at_once, most_at_once: requests of encoders that are being answered, and the most of them.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes]] = []
        self.failing: dict[str, Failure] = {}
        self.seconds = 0.0
        self.at_once = self.most_at_once = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.url.host, request.content))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(self.seconds)
        self.at_once -= 1
        if fail := self.failing.get(request.url.host):
            return fail(request)
        return answer(200, json.dumps({"from": request.url.host}))

    def fail(self, addresses: list[str], failure: Failure) -> None:
        self.failing |= {httpx.URL(each).host: failure for each in addresses}

    def encoded(self) -> list[str]:
        """Encoders that were asked, in their order."""
        return [name for name, _ in self.asked if name.startswith("encoder")]

    def encoders_of(self, number: int) -> list[str]:
        """Encoders that were asked about a picture, in their order."""
        url = picture(number)["image_url"]["url"].encode()
        return [name for name, body in self.asked if name.startswith("encoder") and url in body]


def refuse_connection(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("nobody listens", request=request)


def break_off(request: httpx.Request) -> httpx.Response:
    raise httpx.RemoteProtocolError("the connection was closed", request=request)


def gives(status: int) -> Failure:
    """A server's answer with a status."""

    def fail(_: httpx.Request) -> httpx.Response:
        return answer(status, f"this is {status}")

    fail.__name__ = f"HTTP {status}"
    return fail


UNAVAILABLE = [gives(status) for status in (502, 503, 504)]
FAILURES = [refuse_connection, break_off, *UNAVAILABLE]


def ask(
    servers: Servers, *bodies: Any, path: str = CHATS, settings: Settings | None = None
) -> list[httpx.Response]:
    """Answers of one proxy to requests, one after the other."""

    async def run() -> list[httpx.Response]:
        fleet = Fleet(ENCODERS, DECODERS, settings or Settings())
        fleet.client = httpx.AsyncClient(transport=httpx.MockTransport(servers))
        transport = httpx.ASGITransport(make_app(fleet))
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            contents = (each if isinstance(each, bytes) else json.dumps(each) for each in bodies)
            return [await client.post(path, content=content) for content in contents]

    return asyncio.run(run())

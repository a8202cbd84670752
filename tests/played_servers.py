# SPDX-License-Identifier: Apache-2.0
"""Servers that a test plays on loopback sockets, and the examples' proxy before them."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from fleet import Fleet, Settings
from proxy import make_app

QUICK = Settings(check_seconds=0.02, health_seconds=0.2, rest_seconds=0.01)


@dataclass
class Connection:
    """A request that a server has, and the connection that it came over."""

    head: bytes
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self, text: str = "{}", status: int = 200, header: str = "") -> None:
        await self.send(
            f"HTTP/1.1 {status} Said\r\nContent-Length: {len(text)}\r\n{header}\r\n{text}"
        )

    async def send(self, text: str) -> None:
        self.writer.write(text.encode())
        await self.writer.drain()

    async def begin(self) -> None:
        """The head of an answer that comes in pieces, and its first piece."""
        await self.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")

    async def closes(self) -> None:
        """Wait until the other side leaves."""
        assert await self.reader.read() == b""


Play = Callable[[Connection], Awaitable[None]]


@dataclass
class Server:
    """Plays a server.

    Attributes:
        play: what it does with a request that is not for `/health`.
        health: what it does with one that is.
        asked: requests that were not for `/health`.
        connections: that were made.
    """

    play: Play = Connection.answer
    health: Play = Connection.answer
    asked: list[Connection] = field(default_factory=list)
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length:")[2].partition(b"\r")[0]
                body = await reader.readexactly(int(length or 0))
                connection = Connection(head, body, reader, writer)
                if head.startswith(b"GET /health "):
                    await self.health(connection)
                else:
                    self.asked.append(connection)
                    await self.play(connection)
        writer.close()


@dataclass
class Proxy:
    """A proxy that runs, and a client of it."""

    fleet: Fleet
    client: httpx.AsyncClient

    async def until(self, encoders: list[bool], decoders: list[bool], status: int = 200) -> None:
        """Wait until this is what the proxy says about the health of its servers."""
        while True:
            found = await self.client.get("/health")
            if [list(each.values()) for each in found.json().values()] == [encoders, decoders]:
                assert found.status_code == status
                return
            await asyncio.sleep(0.01)


def address_of(listening: Any) -> str:
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextlib.asynccontextmanager
async def running(
    encoders: list[Server], decoders: list[Server], settings: Settings = QUICK
) -> AsyncIterator[Proxy]:
    """A proxy before servers; half a minute is for a machine that has other work."""
    async with asyncio.timeout(30), contextlib.AsyncExitStack() as stack:
        addresses: list[list[str]] = [[], []]
        for found, servers in zip(addresses, (encoders, decoders), strict=True):
            for server in servers:
                listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
                stack.callback(listening.close)
                found.append(address_of(listening.sockets[0]))
        listens = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        fleet = Fleet(*addresses, settings)
        config = uvicorn.Config(make_app(fleet), log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listens]))
        stack.push_async_callback(lambda: serving)
        stack.callback(setattr, server, "should_exit", True)
        client = httpx.AsyncClient(base_url=address_of(listens), timeout=None)
        yield Proxy(fleet, await stack.enter_async_context(client))


async def never(connection: Connection) -> None:
    """Answer nothing, as a process that is stopped does."""
    await connection.closes()


async def unavailable(connection: Connection) -> None:
    await connection.answer(status=503)


async def begins(connection: Connection) -> None:
    """Answer with the first piece of an answer, and no more."""
    await connection.begin()
    await connection.closes()

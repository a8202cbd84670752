# SPDX-License-Identifier: Apache-2.0
"""The connections of the examples' proxy: who waits, who leaves, and who has gone, over loopback
sockets, with servers that the tests play."""

import asyncio
import contextlib
import json
import socket
from typing import Any

import httpx
import pytest
from fleet import Answer, Fleet, Settings
from vllm import envs

from tests.played_servers import (
    QUICK,
    Connection,
    Play,
    Server,
    begins,
    never,
    running,
    unavailable,
)

CHATS = "/v1/chat/completions"
TEXT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
PICTURE: dict[str, Any] = {"messages": [{"role": "user", "content": [{"image_url": "a"}]}]}


# -- health --------------------------------------------------------------------------------------


@pytest.mark.parametrize("health", [never, unavailable])
def test_a_server_that_is_down_is_asked_again_when_it_is_up(health: Play) -> None:
    async def run() -> None:
        encoder, decoder = Server(health=health), Server(health=health)
        async with running([encoder], [decoder]) as proxy:
            await proxy.until([False], [False], status=503)
            await proxy.client.post(CHATS, json=PICTURE)
            assert not encoder.asked
            assert decoder.asked  # the only one is asked in any case
            encoder.health = decoder.health = Connection.answer
            await proxy.until([True], [True])
            while not encoder.asked:
                await proxy.client.post(CHATS, json=PICTURE)

    asyncio.run(run())


def test_an_encoder_that_hangs_is_left_when_its_health_check_fails() -> None:
    """Long before its time for a picture is over."""

    async def run() -> None:
        encoders, decoder = [Server(), Server()], Server()
        for each in encoders:
            each.play = each.health = never
        async with running(encoders, [decoder]) as proxy:
            found = await proxy.client.post(CHATS, json=PICTURE)
            assert found.status_code == 200
            assert any(each.asked for each in encoders)
            await proxy.until([False, False], [True])

    asyncio.run(run())


def test_an_encoder_has_so_much_time_and_a_decoder_any() -> None:
    async def late(connection: Connection) -> None:
        await asyncio.sleep(0.2)
        await connection.answer("late")

    async def run() -> None:
        encoder, decoder = Server(never), Server(late)
        settings = Settings(encode_seconds=0.05, check_seconds=0.02)
        async with running([encoder], [decoder], settings) as proxy:
            found = await proxy.client.post(CHATS, json=PICTURE)
            assert found.text == "late"
            assert len(encoder.asked) == len(decoder.asked) == 1
            await proxy.until([False], [True])
            assert proxy.fleet.client.timeout == httpx.Timeout(None, connect=5)

    asyncio.run(run())


def test_idle_connections_are_left_before_vllm_closes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(httpx, "AsyncHTTPTransport", given.update)
    Fleet([], [], QUICK)
    assert 0 < given["limits"].keepalive_expiry <= envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE - 2
    assert (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1) in given["socket_options"]


# -- answers -------------------------------------------------------------------------------------


def test_an_answer_comes_piece_by_piece() -> None:
    """The decoder says its second piece when the client has the first."""
    has_first = asyncio.Event()

    async def streams(connection: Connection) -> None:
        await connection.begin()
        await has_first.wait()
        await connection.send("6\r\nsecond\r\n0\r\n\r\n")

    async def run() -> None:
        async with (
            running([], [Server(streams)]) as proxy,
            proxy.client.stream("POST", CHATS, json=TEXT) as found,
        ):
            pieces = []
            async for piece in found.aiter_raw():
                pieces.append(piece)
                has_first.set()
            assert pieces == [b"first", b"second"]

    asyncio.run(run())


def test_an_answer_that_breaks_off_is_not_whole_for_the_client() -> None:
    async def breaks(connection: Connection) -> None:
        await connection.begin()
        connection.writer.close()

    async def run() -> None:
        broken, other = Server(breaks), Server()
        async with running([], [broken, other], Settings()) as proxy:
            with pytest.raises(httpx.RemoteProtocolError):
                await proxy.client.post(CHATS, json=TEXT)
            assert not other.asked  # nothing is said twice
            await proxy.until([], [False, True])

    asyncio.run(run())


@pytest.mark.parametrize(
    ("works", "play"),
    [("encoder", never), ("decoder", never), ("decoder", begins)],
    ids=["while it is encoded", "before the answer", "in the answer"],
)
def test_a_client_that_leaves_ends_its_work(works: str, play: Play) -> None:
    async def run() -> None:
        left = asyncio.Event()

        async def waits(connection: Connection) -> None:
            await play(connection)
            left.set()

        servers = {"encoder": Server(), "decoder": Server()}
        servers[works].play = waits
        async with running([servers["encoder"]], [servers["decoder"]], Settings()) as proxy:
            asking = asyncio.create_task(proxy.client.post(CHATS, json=PICTURE))
            while not servers[works].asked:
                await asyncio.sleep(0.01)
            asking.cancel()
            await left.wait()
            while any(each.requests for each in proxy.fleet.encoders + proxy.fleet.decoders):
                await asyncio.sleep(0.01)
            assert bool(servers["decoder"].asked) == (works == "decoder")

    asyncio.run(run())


def test_an_answer_is_closed_though_its_client_has_left_before_it() -> None:
    """At once, and not when its garbage is collected."""
    closed = asyncio.Event()

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        await asyncio.Event().wait()

    async def run() -> None:
        stack = contextlib.AsyncExitStack()
        stack.callback(closed.set)
        (decoder,) = Fleet([], ["http://a"], QUICK).decoders
        answer = Answer(httpx.Response(200, content=b"text"), decoder, stack)
        await answer({"type": "http"}, receive, send)
        assert closed.is_set()

    asyncio.run(run())


def test_a_body_that_is_too_large_is_refused_while_it_comes() -> None:
    """And the client's connection has its next request."""

    async def run() -> None:
        decoder = Server()
        async with running([], [decoder], Settings(max_body_bytes=1000)) as proxy:
            for status, size in ((413, 8 << 20), (200, 1000), (413, 1001)):
                found = await proxy.client.post(CHATS, content=b"x" * size)
                assert found.status_code == status
            assert len(decoder.asked) == 1

    asyncio.run(run())


# -- headers -------------------------------------------------------------------------------------


def test_headers_are_passed_on_as_they_are() -> None:
    async def run() -> None:
        encoder, decoder = Server(), Server()
        async with running([encoder], [decoder]) as proxy:
            headers = [
                (b"Authorization", b"Bearer key"),
                (b"X-Name", b"Ren\xe9 \xe2\x82\xac"),
                (b"X-Data-Parallel-Rank", b"1"),
                (b"Content-Type", b"application/json"),
            ]
            found = await proxy.client.post(CHATS, content=json.dumps(PICTURE), headers=headers)
            assert found.status_code == 200
        for server in (encoder, decoder):
            (asked,) = server.asked
            lines = asked.head.split(b"\r\n")
            assert b"authorization: Bearer key" in lines
            assert b"x-name: Ren\xe9 \xe2\x82\xac" in lines
            assert b"content-type: application/json" in lines
            assert (b"x-data-parallel-rank: 1" in lines) == (server is decoder)

    asyncio.run(run())


def test_a_cookie_is_its_clients_alone() -> None:
    async def sets(connection: Connection) -> None:
        await connection.answer(header="Set-Cookie: who=first\r\nSet-Cookie: and=more\r\n")

    async def run() -> None:
        decoder = Server(sets)
        async with running([], [decoder]) as proxy:
            found = await proxy.client.post(CHATS, json=TEXT)
            assert found.headers.get_list("set-cookie") == ["who=first", "and=more"]
            proxy.client.cookies.clear()
            await proxy.client.post(CHATS, json=TEXT)
        assert not any(b"cookie" in asked.head.lower() for asked in decoder.asked)

    asyncio.run(run())

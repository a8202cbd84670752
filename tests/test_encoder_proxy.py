# SPDX-License-Identifier: Apache-2.0
"""The proxy of the examples when servers fail, with servers that the tests play.

With real ones, one of which is killed under load: tests/e2e/test_encoder_proxy.py.
"""

import asyncio
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

FILE = Path(__file__).parents[1] / "examples" / "online_serving" / "encoder_proxy.py"
SPEC = importlib.util.spec_from_file_location("encoder_proxy", FILE)
assert SPEC is not None
assert SPEC.loader is not None
encoder_proxy = importlib.util.module_from_spec(SPEC)
sys.modules["encoder_proxy"] = encoder_proxy  # its dataclass looks itself up
SPEC.loader.exec_module(encoder_proxy)

ENCODERS = [f"http://encoder-{number}" for number in range(4)]
DECODERS = ["http://decoder-0", "http://decoder-1"]


def picture(number: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"http://pictures/{number}"}}


def chat_about(*numbers: int) -> dict[str, Any]:
    content = [*map(picture, numbers), {"type": "text", "text": "What is it?"}]
    return {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 9}


def answer(status: int, text: str) -> httpx.Response:
    """An answer that comes over a connection, and is read once."""

    async def pieces() -> AsyncIterator[bytes]:
        yield text.encode()

    return httpx.Response(status, content=pieces())


class Servers:
    """Plays all servers.

    Attributes:
        asked: requests in their order, as the server's name and the body.
        failing: what servers do that do not answer with HTTP 200, by their names.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes]] = []
        self.failing: dict[str, Callable[[httpx.Request], httpx.Response]] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.url.host, request.content))
        if fail := self.failing.get(request.url.host):
            return fail(request)
        return answer(200, json.dumps({"from": request.url.host}))

    def encoders_of(self, number: int) -> list[str]:
        """Encoders that were asked about a picture, in their order."""
        url = picture(number)["image_url"]["url"].encode()
        return [name for name, body in self.asked if name.startswith("encoder") and url in body]


def refuse_connection(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("nobody listens", request=request)


def break_off(request: httpx.Request) -> httpx.Response:
    raise httpx.RemoteProtocolError("the connection was closed", request=request)


def error(_: httpx.Request) -> httpx.Response:
    return answer(503, "shutting down")


FAILURES = [refuse_connection, break_off, error]


@pytest.fixture
def servers() -> Servers:
    return Servers()


def ask(servers: Servers, *bodies: Any, path: str = "/v1/chat/completions") -> list[httpx.Response]:
    """Answers of one proxy to requests, one after the other."""

    async def run() -> list[httpx.Response]:
        fleet = encoder_proxy.Fleet(ENCODERS, DECODERS)
        fleet.client = httpx.AsyncClient(transport=httpx.MockTransport(servers))
        transport = httpx.ASGITransport(encoder_proxy.make_app(fleet))
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            contents = (each if isinstance(each, bytes) else json.dumps(each) for each in bodies)
            return [await client.post(path, content=content) for content in contents]

    return asyncio.run(run())


def test_each_picture_goes_to_one_encoder_and_the_same_again(servers: Servers) -> None:
    answers = ask(servers, chat_about(0, 1, 0), chat_about(1))
    assert [each.status_code for each in answers] == [200, 200]
    assert len(servers.encoders_of(0)) == 1
    assert len(servers.encoders_of(1)) == 2
    assert len(set(servers.encoders_of(1))) == 1


def test_an_encoder_is_asked_for_what_the_chat_decides(servers: Servers) -> None:
    ask(servers, chat_about(3) | {"mm_processor_kwargs": {"size": 5}, "stream": True})
    (name, encoded), (last, decoded) = servers.asked
    assert name.startswith("encoder")
    assert last.startswith("decoder")
    assert json.loads(encoded) == {
        "model": "m",
        "messages": [{"role": "user", "content": [picture(3)]}],
        "max_tokens": 1,
        "mm_processor_kwargs": {"size": 5},
    }
    assert json.loads(decoded)["stream"]


@pytest.mark.parametrize("failure", FAILURES)
def test_the_pictures_of_an_encoder_that_fails_go_to_the_next(
    servers: Servers, failure: Callable[[httpx.Request], httpx.Response]
) -> None:
    ask(servers, chat_about(0))
    (first,) = servers.encoders_of(0)
    servers.asked.clear()
    servers.failing[first] = failure
    answers = ask(servers, chat_about(0), chat_about(0))
    assert [each.status_code for each in answers] == [200, 200]
    failed, second, again = servers.encoders_of(0)  # the failed one is not asked a second time
    assert failed == first
    assert second == again != first


@pytest.mark.parametrize("failure", FAILURES)
def test_without_encoders_the_decoder_is_asked(
    servers: Servers, failure: Callable[[httpx.Request], httpx.Response]
) -> None:
    servers.failing = {httpx.URL(address).host: failure for address in ENCODERS}
    (found,) = ask(servers, chat_about(0))
    assert found.json()["from"].startswith("decoder")
    assert len(servers.encoders_of(0)) == len(ENCODERS)


@pytest.mark.parametrize("failure", [refuse_connection, break_off])
def test_a_decoder_that_fails_is_replaced(
    servers: Servers, failure: Callable[[httpx.Request], httpx.Response]
) -> None:
    servers.failing["decoder-0"] = failure
    for found in ask(servers, chat_about(), chat_about()):
        assert found.json()["from"] == "decoder-1"
    servers.failing["decoder-1"] = failure
    (found,) = ask(servers, chat_about())
    assert (found.status_code, found.json()["error"]["message"]) == (503, "no decoder answers")


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff",
        b"[]",
        b"7",
        {"messages": 3},
        {"messages": [3, {"content": [4, {"type": "image_url"}]}]},
    ],
    ids=str,
)
def test_what_is_no_chat_is_the_decoders_to_refuse(servers: Servers, body: Any) -> None:
    servers.failing["decoder-0"] = lambda _: answer(400, "no chat")
    (found,) = ask(servers, body)
    assert (found.status_code, found.text) == (400, "no chat")


def test_other_routes_are_the_decoders(servers: Servers) -> None:
    (found,) = ask(servers, {"prompt": "Hello"}, path="/v1/completions?a=b")
    assert found.json() == {"from": "decoder-0"}


def test_pictures_are_spread_and_few_move_when_an_encoder_goes() -> None:
    fleet = [encoder_proxy.Server(address) for address in ENCODERS]
    before = [encoder_proxy.ranked(fleet, str(number))[0] for number in range(2000)]
    counts = Counter(server.address for server in before)
    assert all(400 < counts[address] < 600 for address in ENCODERS)
    fleet[1].healthy = False
    after = [encoder_proxy.ranked(fleet, str(number))[0] for number in range(2000)]
    moved = [old for old, new in zip(before, after, strict=True) if old is not new]
    assert moved == [server for server in before if server is fleet[1]]

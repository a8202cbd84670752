# SPDX-License-Identifier: Apache-2.0
"""What the proxy of the examples asks of which server, with servers that the tests play.

Over connections: test_encoder_proxy_connections.py; with real servers, one of which is killed
under load: e2e/test_encoder_proxy.py.
"""

import argparse
import json
from collections import Counter
from typing import Any

import httpx
import pytest
from fleet import Settings
from proxy import address, main
from server import Server, ranked

from tests.mocked_servers import (
    CHATS,
    DECODERS,
    ENCODERS,
    FAILURES,
    Failure,
    Servers,
    answer,
    ask,
    break_off,
    chat_about,
    gives,
    picture,
    refuse_connection,
)


@pytest.fixture
def servers() -> Servers:
    return Servers()


# -- pictures ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "part",
    [
        {"image_url": "http://pictures/0"},
        {"image_url": {"url": "http://pictures/0"}},
        {"type": "input_image", "image_url": "http://pictures/0"},
        {"image_url": None, "uuid": "a"},
        {"image_url": "\ud800"},
    ],
    ids=str,
)
def test_a_part_with_a_picture_is_encoded_whatever_its_type(servers: Servers, part: Any) -> None:
    ask(servers, {"messages": [{"role": "user", "content": [part]}]})
    (_, encoded), _ = servers.asked
    assert json.loads(encoded)["messages"][0]["content"] == [part]


def test_a_uuid_names_the_picture(servers: Servers) -> None:
    """As in vLLM, which looks for features by it: what has the same one is the same picture."""
    parts = [picture(0), picture(0) | {"uuid": "a"}, picture(0) | {"uuid": "b"}]
    ask(servers, {"messages": [{"content": parts}]})
    assert len(servers.encoded()) == 3
    servers.asked.clear()
    again = [picture(0) | {"uuid": "a"}, {"image_url": None, "uuid": "a"}]
    ask(servers, {"messages": [{"content": again}]})
    assert len(servers.encoded()) == 1


@pytest.mark.parametrize("failure", FAILURES)
def test_the_pictures_of_an_encoder_that_fails_go_to_the_next(
    servers: Servers, failure: Failure
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
def test_without_encoders_the_decoder_is_asked(servers: Servers, failure: Failure) -> None:
    servers.fail(ENCODERS, failure)
    (found,) = ask(servers, chat_about(0))
    assert found.json()["from"].startswith("decoder")
    assert len(servers.encoders_of(0)) == len(ENCODERS)


@pytest.mark.parametrize(("status", "asked"), [(400, 1), (401, 4), (404, 4), (429, 4), (500, 4)])
def test_an_encoders_refusal_is_said_once_and_may_be_its_own_alone(
    servers: Servers, status: int, asked: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong picture is wrong everywhere; a wrong key or name need not be. Nobody rests for it."""
    servers.fail(ENCODERS, gives(status))
    for found in ask(servers, chat_about(0), chat_about(0)):
        assert found.status_code == 200
    assert len(servers.encoders_of(0)) == 2 * asked
    assert servers.encoders_of(0)[:asked] == servers.encoders_of(0)[asked:]
    words = f"HTTP {status}; that is said once: this is {status}"
    assert sum(words in message for message in caplog.messages) == asked


def test_a_chat_has_some_pictures_encoded_at_once(servers: Servers) -> None:
    servers.seconds = 0.01
    ask(servers, chat_about(*range(9)), settings=Settings(encodes_at_once=3))
    assert servers.most_at_once == 3
    assert len(servers.encoded()) == 9


def test_a_chat_with_too_many_pictures_is_the_decoders(servers: Servers) -> None:
    ask(servers, chat_about(0, 1, 2), settings=Settings(max_pictures=2))
    assert not servers.encoded()
    assert len(servers.asked) == 1
    ask(servers, chat_about(0, 1), settings=Settings(max_pictures=2))
    assert len(servers.encoded()) == 2


def test_pictures_are_spread_and_few_move_when_an_encoder_goes() -> None:
    fleet = [Server(address, 1) for address in ENCODERS]
    before = [ranked(fleet, str(number))[0] for number in range(2000)]
    counts = Counter(server.address for server in before)
    assert all(400 < counts[address] < 600 for address in ENCODERS)
    fleet[1].checked(False)
    after = [ranked(fleet, str(number))[0] for number in range(2000)]
    moved = [old for old, new in zip(before, after, strict=True) if old is not new]
    assert moved == [server for server in before if server is fleet[1]]


# -- decoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", FAILURES)
def test_a_decoder_that_fails_is_replaced(servers: Servers, failure: Failure) -> None:
    """It answers faster than the others, but is asked once alone."""
    servers.failing["decoder-0"] = failure
    for found in ask(servers, *[chat_about()] * 3):
        assert found.json() == {"from": "decoder-1"}
    assert [name for name, _ in servers.asked].count("decoder-0") == 1


@pytest.mark.parametrize("failure", [refuse_connection, break_off])
def test_that_no_decoder_answers_is_an_error(servers: Servers, failure: Failure) -> None:
    servers.fail(DECODERS, failure)
    (found,) = ask(servers, chat_about())
    assert (found.status_code, found.json()["error"]["message"]) == (503, "no decoder answers")


@pytest.mark.parametrize("status", [502, 503, 504])
def test_the_refusal_of_all_decoders_is_passed_on(servers: Servers, status: int) -> None:
    servers.fail(DECODERS, gives(status))
    (found,) = ask(servers, chat_about())
    assert (found.status_code, found.text) == (status, f"this is {status}")
    assert found.headers["from"] == "the server"
    assert len(servers.asked) == 2


@pytest.mark.parametrize("status", [400, 404, 429, 500])
def test_any_other_status_is_an_answer(servers: Servers, status: int) -> None:
    servers.fail(DECODERS, gives(status))
    (found,) = ask(servers, chat_about())
    assert (found.status_code, found.text) == (status, f"this is {status}")
    assert len(servers.asked) == 1


def test_a_decoder_that_has_rested_is_asked_again(servers: Servers) -> None:
    servers.failing["decoder-0"] = gives(503)
    ask(servers, chat_about(), chat_about(), settings=Settings(rest_seconds=1e-9))
    assert [name for name, _ in servers.asked] == ["decoder-0", "decoder-1"] * 2


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff",
        b"[]",
        b"7",
        b"[" * 100_000,
        b'{"messages": [{"content": [{"image_url": ' + b"[" * 100_000,
        {"messages": 3},
        {"messages": [3, {"content": [4, {"type": "image_url"}]}]},
    ],
    ids=lambda body: str(body)[:50],
)
def test_what_is_no_chat_is_the_decoders_to_refuse(servers: Servers, body: Any) -> None:
    servers.failing["decoder-0"] = gives(400)
    (found,) = ask(servers, body)
    assert (found.status_code, found.text) == (400, "this is 400")
    assert not servers.encoded()


@pytest.mark.parametrize(
    "path", ["/v1/completions?a=b%2F", "/docs", "/redoc", "/openapi.json", "/docs/a%2Fb"]
)
def test_other_routes_are_the_decoders(servers: Servers, path: str) -> None:
    targets: list[bytes] = []

    def keep(request: httpx.Request) -> httpx.Response:
        targets.append(request.url.raw_path)
        return answer(200, "kept")

    servers.failing["decoder-0"] = keep
    (found,) = ask(servers, chat_about(0), path=path)
    assert found.text == "kept"
    assert targets == [path.encode()]
    assert not servers.encoded()


@pytest.mark.parametrize("path", [CHATS, "/v1/completions"])
def test_a_request_that_is_too_large_is_refused(servers: Servers, path: str) -> None:
    largest = Settings(max_body_bytes=100)
    fits, exceeds = ask(servers, b"x" * 100, b"x" * 101, path=path, settings=largest)
    assert fits.status_code == 200
    assert exceeds.status_code == 413
    assert (
        exceeds.json()["error"]["message"] == "a request has at most 100 bytes (--max-body-bytes)"
    )
    assert len(servers.asked) == 1


# -- flags ---------------------------------------------------------------------------------------


def test_an_address_has_no_slash_at_its_end() -> None:
    assert address("http://a:8000//") == "http://a:8000"
    assert address("https://a") == "https://a"
    for wrong in ("a:8000", "a", "http://", "http://a/v1", "ftp://a", "http://a:b"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not like http://host:8000"):
            address(wrong)


@pytest.mark.parametrize("flag", ["encode-seconds", "encodes-at-once", "max-body-bytes"])
def test_a_limit_is_above_zero(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["proxy", "--encoder", "http://a", "--decoder", "http://b", f"--{flag}", "0"]
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises(SystemExit):
        main()
    assert f"{flag.replace('-', '_')} has to be above zero" in capsys.readouterr().err

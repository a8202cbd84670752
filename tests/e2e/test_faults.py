# SPDX-License-Identifier: Apache-2.0
"""What breaks breaks alone, or ends in order: errors in bounded time, and nothing stays behind.

The faults come from a plugin of vLLM's in the folder ``faulty``: pictures of certain colours make
the encoder raise, give NaN, run out of memory or stall.
"""

import contextlib
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.asked import (
    BOUND_SECONDS,
    ENDLESS,
    MAX_MODEL_LEN,
    QUESTION,
    Asked,
    asked,
    faulty,
    good,
)
from tests.e2e.faulty.faulty_encoder import (
    ENGINE_LEAVES,
    FIRST_STALLS,
    NAN,
    OUT_OF_MEMORY,
    RAISES,
    STALLED,
    STALLS_UNTIL_SIGTERM,
)
from tests.e2e.serving import START_SECONDS, Served, chat, starting_server
from tests.e2e.test_server import answer, picture
from tests.reference import Reference

FAULTY = Path(__file__).parent / "faulty"


@dataclass(frozen=True)
class Servers:
    """Servers that start together, one for each way to end.

    Attributes:
        faults: for what a server survives, and SIGTERM at the end.
        leaving: lets its engine leave in order, as :data:`ENGINE_LEAVES` says.
        engine: for its engine's end.
        hanging: for an encoder that hangs; it may for two seconds.
        worker: of two ranks, for the end of one.
        whole: of two ranks, for its own end.
    """

    faults: Served
    leaving: Served
    engine: Served
    hanging: Served
    worker: Served
    whole: Served


@pytest.fixture(scope="module")
def servers(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("faults")
    two = ("--tensor-parallel-size", "2")
    flags: dict[str, tuple[str, ...]] = {name: () for name in ("faults", "leaving", "engine")}
    flags |= {"worker": two, "whole": two}
    flags["hanging"] = ("--additional-config", '{"encode_timeout_seconds": 2}')
    with contextlib.ExitStack() as stack:
        yield Servers(
            **{
                name: stack.enter_context(
                    starting_server(
                        demo_checkpoint,
                        folder / name,
                        *("--max-model-len", str(MAX_MODEL_LEN), "--enable-log-requests"),
                        *more,
                        plugins=[FAULTY],
                        environment={
                            "OMP_NUM_THREADS": "1",  # they share the machine
                            **({ENGINE_LEAVES: "1"} if name == "leaving" else {}),
                        },
                    )
                )
                for name, more in flags.items()
            }
        )


@pytest.fixture(scope="module")
def server(servers: Servers) -> Iterator[Asked]:
    """For the faults that it survives; the last test with it ends it."""
    with asked(servers.faults) as server:
        yield server


def failed(request: "Future[str]") -> str:
    """The sentence that a request failed with."""
    with pytest.raises(openai.APIError) as raised:
        request.result(BOUND_SECONDS)
    return str(raised.value)


# -- faults of one request ------------------------------------------------------------------------

SENTENCES = {
    RAISES: "could not be encoded: ValueError: this picture is not to my taste",
    NAN: "was encoded to features with NaN or infinity in float32",
    OUT_OF_MEMORY: "could not be encoded: RuntimeError: [enforce fail at alloc_cpu",
}


@pytest.mark.parametrize("fault", SENTENCES, ids=["raises", "NaN", "out of memory"])
def test_one_request_fails_and_the_others_do_not_notice(
    server: Asked, demo_reference: Reference, fault: int
) -> None:
    beside = 20 + list(SENTENCES).index(fault)  # a picture that no other request has shown
    alone = [chat(server.client, QUESTION, good(seed)) for seed in range(4)]
    others = [server.ask(good(seed)) for seed in range(4)]
    failing = server.ask(good(beside), faulty(fault))
    more = [server.ask(good(seed)) for seed in range(4)]
    assert "the request failed: image 2 of the request" in failed(failing)
    assert SENTENCES[fault] in failed(server.ask(faulty(fault)))
    assert [each.result() for each in others] == alone
    assert [each.result() for each in more] == alone
    # The good picture of the failed request was in its step; it is encoded anew.
    expected = answer(demo_reference, QUESTION, picture(beside).image)
    assert chat(server.client, QUESTION, good(beside)) == expected


def read_stream(server: Asked, url: str) -> str:
    """All events of a stream about a picture, which goes on until it is ended."""
    content: list[Any] = [{"type": "image_url", "image_url": {"url": url}}]
    stream = server.client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": content}],
        stream=True,
        extra_body={"ignore_eos": True, "max_tokens": ENDLESS},
    )
    return "".join(str(event) for event in stream)


def test_a_stream_fails_with_a_sentence(server: Asked) -> None:
    request = server.threads.submit(read_stream, server, faulty(RAISES))
    assert SENTENCES[RAISES] in failed(request)


SHUT_DOWN = "the server was shut down before this request was finished"


def test_sigterm_under_load_answers_everybody(server: Asked) -> None:
    """Those under way and those behind a step that does not end: nothing is answered but so."""
    under_way = server.load(3)
    under_way += server.stall() + server.load(3)
    server.server.process.send_signal(signal.SIGTERM)
    for request in under_way:
        assert SHUT_DOWN in failed(request)
    server.ends(0, "shutting down FastAPI HTTP server")


def test_an_engine_that_leaves_before_it_is_killed_gives_no_half_answers(servers: Servers) -> None:
    """It sends what its requests have so far; whether the server gets that is a race otherwise."""
    with asked(servers.leaving) as server:
        under_way = server.load(3)
        under_way += server.taken(lambda _: server.threads.submit(read_stream, server, good(8)))
        under_way += server.stall(STALLS_UNTIL_SIGTERM) + server.load(3)
        server.server.process.send_signal(signal.SIGTERM)
        for request in under_way:
            assert SHUT_DOWN in failed(request)
        server.ends(0, "aborting in-flight requests count=")


# -- faults of a process --------------------------------------------------------------------------


def test_the_engine_killed_in_the_middle_of_a_step(servers: Servers) -> None:
    with asked(servers.engine) as server:
        under_way = server.load(2)
        server.stall()
        under_way += server.load(2)
        server.process("EngineCore").kill()
        for request in under_way:
            assert "EngineCore encountered an issue" in failed(request)
        server.ends(1, "the engine's process ended unexpectedly")


def test_an_encoder_that_hangs_ends_the_engine(servers: Servers) -> None:
    with asked(servers.hanging) as server:
        assert chat(server.client, QUESTION, good(7))
        under_way = server.load(2)
        under_way += server.stall()
        for request in under_way:
            assert "EngineCore encountered an issue" in failed(request)
        server.ends(1, "The vision encoder did not end a layer within 2 s (encode_timeout_seconds)")
        assert "in pieces" in server.server.log.read_text()  # where it hangs


def test_a_worker_killed_in_the_middle_of_a_step(servers: Servers) -> None:
    with asked(servers.worker) as server:
        under_way = server.load(2)
        for fault, sentence in SENTENCES.items():  # of one request, on both ranks
            assert sentence in failed(server.ask(faulty(fault)))
        assert chat(server.client, QUESTION, good(7)) == chat(server.client, QUESTION, good(7))
        server.stall()
        server.process("Worker_TP1").kill()
        for request in under_way:
            assert "EngineCore encountered an issue" in failed(request)
        server.ends(1, "the engine's process ended unexpectedly")


def test_the_server_killed_in_the_middle_of_a_step(servers: Servers) -> None:
    """Its engine waits for a step that does not end, and the workers are in it."""
    with asked(servers.whole) as server:
        server.stall()
        server.server.process.kill()
        server.ends(-signal.SIGKILL, "is gone: it ends too")


def test_sigterm_during_the_warmup(demo_checkpoint: Path, tmp_path: Path) -> None:
    log, environment = tmp_path / "log.txt", {FIRST_STALLS: "1"}
    with starting_server(demo_checkpoint, log, plugins=[FAULTY], environment=environment) as server:
        asked = Asked(server)
        asked.wait_for(lambda: STALLED in log.read_text(), START_SECONDS)
        assert "Warming up" in log.read_text()
        asked.look()
        server.process.send_signal(signal.SIGTERM)
        asked.ends(1, "the server was told to end before it was ready")

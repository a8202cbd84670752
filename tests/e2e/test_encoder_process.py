# SPDX-License-Identifier: Apache-2.0
"""A server on the stand-in card, whose encoder's process fails, hangs, is killed, or is left alone.

The faults come from the plugin in the folder ``faulty``, which that process loads too.
"""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import openai
import psutil
import pytest

from tests.e2e.asked import QUESTION, Asked, asked, faulty, good
from tests.e2e.conftest import STAND_IN
from tests.e2e.faulty.faulty_encoder import NAN, OUT_OF_MEMORY, RAISES, STALLED, STALLS
from tests.e2e.serving import Served, chat, starting_server
from tests.e2e.test_faults import FAULTY, SENTENCES, SHUT_DOWN, failed

TIMEOUT = 5
ENCODER = "VLLM::Encoder"
REASON = "could not be encoded: the vision encoder's process "
LONG = {"extra_body": {"ignore_eos": True, "max_tokens": 60}}
RESTART_SECONDS = 300.0
"""For a request that waits for the next process, which imports and compiles what it needs."""


@pytest.fixture(scope="module")
def servers(
    demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Served]]:
    """Two that start together: of one rank, and of two."""
    folder = tmp_path_factory.mktemp("encoder_process")
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                starting_server(
                    demo_checkpoint,
                    folder / f"{ranks}.txt",
                    *("--max-num-batched-tokens", "128", "--enable-log-requests"),
                    *("--additional-config", json.dumps({"encode_timeout_seconds": seconds})),
                    *("--tensor-parallel-size", str(ranks)),
                    plugins=[STAND_IN, FAULTY],
                    environment={"OMP_NUM_THREADS": "1"},
                    defaults=True,
                )
            )
            for ranks, seconds in ((1, TIMEOUT), (2, 600))
        ]


@pytest.fixture(scope="module")
def server(servers: list[Served]) -> Iterator[Asked]:
    """For what it survives; the last test with it ends it."""
    with asked(servers[0]) as server:
        server.client = server.client.with_options(timeout=RESTART_SECONDS)
        yield server


def encoder(server: Asked) -> psutil.Process:
    """The encoder's process of the moment."""
    root = psutil.Process(server.server.process.pid)
    (found,) = (each for each in root.children(recursive=True) if ENCODER in each.name())
    return found


def stalls(server: Asked) -> int:
    """How often an encoder has stalled so far."""
    return server.server.log.read_text().count(STALLED)


def answered(request: "Future[str]") -> str | None:
    """The answer; None if the request failed as those do whose encoder's process ended."""
    if (error := request.exception(RESTART_SECONDS)) is None:
        return request.result()
    assert isinstance(error, openai.APIError)
    assert REASON in str(error)
    return None


@pytest.mark.parametrize("fault", SENTENCES, ids=["raises", "NaN", "out of memory"])
def test_a_fault_of_the_encoder_fails_one_request(server: Asked, fault: int) -> None:
    assert [*SENTENCES] == [RAISES, NAN, OUT_OF_MEMORY]
    before = encoder(server).pid
    alone = [chat(server.client, QUESTION, good(seed)) for seed in range(3)]
    others = [server.ask(good(seed), good(20 + seed)) for seed in range(3)]
    failing = server.ask(good(30), faulty(fault))
    more = [server.ask(good(seed)) for seed in range(3)]
    sentence = SENTENCES[fault].replace("float32", "bfloat16")
    assert sentence in (said := failed(failing))
    assert "image 2 of the request" in said
    assert all(request.result(RESTART_SECONDS) for request in others)
    assert [request.result(RESTART_SECONDS) for request in more] == alone
    assert encoder(server).pid == before


def test_a_picture_at_which_the_encoder_hangs_fails_and_texts_run_on(server: Asked) -> None:
    before, alone = encoder(server), chat(server.client, QUESTION, good(1))
    (text,) = server.taken(lambda _: server.ask(**LONG))
    hanging = server.stall()[0]
    behind = server.ask(good(40))
    reason = f"{REASON}did not encode a batch within {TIMEOUT} s (encode_timeout_seconds)"
    assert reason in failed(hanging)
    assert text.result(RESTART_SECONDS)
    assert behind.result(RESTART_SECONDS)
    assert chat(server.client, QUESTION, good(1)) == alone
    assert encoder(server).pid != before.pid
    assert not before.is_running()


def test_the_process_killed_under_load(server: Asked) -> None:
    alone = [chat(server.client, QUESTION, good(seed)) for seed in range(4)]
    (text,) = server.taken(lambda _: server.ask(**LONG))
    for first in (100, 200):
        killed = encoder(server)
        pictures = server.taken(lambda seed, first=first: server.ask(good(first + seed)), 8)
        killed.kill()
        answers = [answered(request) for request in pictures]
        assert answers.count(None) <= 1, "one that was alone in its batch"
        assert encoder(server).pid != killed.pid
    assert text.result(RESTART_SECONDS)
    assert [chat(server.client, QUESTION, good(seed)) for seed in range(4)] == alone


def test_sigterm_while_a_picture_is_encoded(server: Asked) -> None:
    server.look()
    assert [each for each in server.processes if ENCODER in each.name()]
    before = stalls(server)
    request = server.ask(faulty(STALLS))
    server.wait_for(lambda: stalls(server) == before + 1)
    server.server.process.send_signal(signal.SIGTERM)
    assert SHUT_DOWN in failed(request)
    server.ends(0, "shutting down FastAPI HTTP server")


def test_the_engine_killed_while_a_picture_is_encoded(servers: list[Served]) -> None:
    """Of two ranks: one process for both, which ends with the rank that started it."""
    with asked(servers[1]) as server:
        assert chat(server.client, QUESTION, good(1)) == chat(server.client, QUESTION, good(1))
        stalled = server.stall()
        assert ENCODER in encoder(server).name()
        server.process("EngineCore").kill()
        for request in stalled:
            assert "EngineCore encountered an issue" in failed(request)
        server.ends(1, "the engine's process ended unexpectedly")

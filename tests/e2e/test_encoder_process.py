# SPDX-License-Identifier: Apache-2.0
"""A server on the stand-in card, whose encoder's process fails, hangs, is killed, or is left alone.

The faults come from the plugin in the folder ``faulty``, which that process loads too.
"""

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import openai
import psutil
import pytest

from tests.e2e.asked import QUESTION, Asked, asked, faulty, good
from tests.e2e.conftest import STAND_IN
from tests.e2e.faulty.faulty_encoder import NAN, OUT_OF_MEMORY, RAISES
from tests.e2e.serving import Served, chat, starting_server
from tests.e2e.test_faults import FAULTY, SENTENCES, failed

TIMEOUT = 5
ENCODER = "VLLM::Encoder"
MODULE = "vllm_spyre_mm.worker.encoder_process"
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
    with contextlib.ExitStack() as stack:
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


@pytest.fixture(scope="module")
def alone(server: Asked) -> list[str]:
    """Answers about pictures that are asked about one after the other."""
    return [chat(server.client, QUESTION, good(seed)) for seed in range(4)]


def encoder(server: Asked) -> psutil.Process:
    """The encoder's process of the moment, once it has its name."""
    root = psutil.Process(server.server.process.pid)
    (found,) = (each for each in root.children(recursive=True) if ENCODER in each.name())
    return found


def answered(request: "Future[str]") -> str | None:
    """The answer; None if the request failed as those do whose encoder's process ended."""
    if (error := request.exception(RESTART_SECONDS)) is None:
        return request.result()
    assert isinstance(error, openai.APIError)
    assert REASON in str(error)
    return None


@pytest.mark.parametrize("fault", SENTENCES, ids=["raises", "NaN", "out of memory"])
def test_a_fault_of_the_encoder_fails_one_request(
    server: Asked, alone: list[str], fault: int
) -> None:
    assert [*SENTENCES] == [RAISES, NAN, OUT_OF_MEMORY]
    before = encoder(server).pid
    others = [server.ask(good(seed), good(20 + seed)) for seed in range(3)]
    failing = server.ask(good(30), faulty(fault))
    more = [server.ask(good(seed)) for seed in range(4)]
    sentence = SENTENCES[fault].replace("float32", "bfloat16")
    assert sentence in (said := failed(failing))
    assert "image 2 of the request" in said
    assert all(request.result(RESTART_SECONDS) for request in others)
    assert [request.result(RESTART_SECONDS) for request in more] == alone
    assert encoder(server).pid == before


def test_a_picture_at_which_the_encoder_hangs_fails_and_texts_run_on(
    server: Asked, alone: list[str]
) -> None:
    before = encoder(server)
    (text,) = server.taken(lambda _: server.ask(**LONG))
    hanging = server.stall()[0]
    behind = server.ask(good(40))
    reason = f"{REASON}did not encode a batch within {TIMEOUT} s (encode_timeout_seconds)"
    assert reason in failed(hanging)
    assert text.result(RESTART_SECONDS)
    assert behind.result(RESTART_SECONDS)
    assert chat(server.client, QUESTION, good(1)) == alone[1]
    assert encoder(server).pid != before.pid
    assert not before.is_running()


def test_the_process_killed_under_load(server: Asked, alone: list[str]) -> None:
    (text,) = server.taken(lambda _: server.ask(**LONG))
    killed = encoder(server)
    pictures = server.taken(lambda seed: server.ask(good(100 + seed)), 8)
    killed.kill()
    answers = [answered(request) for request in pictures]
    assert answers.count(None) <= 1, "one that was alone in its batch"
    assert encoder(server).pid != killed.pid
    assert text.result(RESTART_SECONDS)
    assert [chat(server.client, QUESTION, good(seed)) for seed in range(4)] == alone


def test_a_process_that_cannot_be_replaced_ends_the_server(server: Asked) -> None:
    """It is killed, and then each that comes in its place; nobody asks for a picture meanwhile."""
    server.look()
    text = server.ask(extra_body={"ignore_eos": True, "max_tokens": 900})
    root = psutil.Process(server.server.process.pid)
    killed: set[int] = set()

    def kill() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in root.children(recursive=True):
                is_one = ENCODER in each.name() or MODULE in each.cmdline()
                if is_one and each.pid not in killed:
                    each.kill()
                    killed.add(each.pid)
        return text.done()

    server.wait_for(kill)
    assert len(killed) == 1 + 3
    assert "EngineCore encountered an issue" in failed(text)
    server.ends(1, "the engine's process ended unexpectedly")
    reason = "failed 3 times in a row before it was ready; the last one was ended by SIGKILL"
    assert f"the vision encoder's process {reason}" in server.server.log.read_text()


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

# SPDX-License-Identifier: Apache-2.0
"""Three data-parallel engines behind one address: two on one host, and one on another.

The second host is a process of its own on this one, which knows the first by its address alone.
"""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.asked import Asked
from tests.e2e.engines import relative_error
from tests.e2e.exits import check_end
from tests.e2e.serving import (
    data_url,
    free_port,
    metrics_by_engine,
    png,
    serve_command,
    starting_server,
)
from tests.e2e.test_server import answer, picture
from tests.reference import Reference
from vllm_spyre_mm.payload import decode_mm_embedding

QUESTION = "What is in the picture?"
ENGINES = ("0", "1", "2")


@contextlib.contextmanager
def engine_of_another_host(checkpoint: Path, log: Path, *flags: str) -> Iterator[None]:
    """The third one, without API server, told to end when the context is left."""
    alone = ("--data-parallel-size-local", "1", "--headless", "--data-parallel-start-rank", "2")
    with (
        log.open("w") as output,
        subprocess.Popen(
            serve_command(checkpoint, 0, *flags, *alone),
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    check_end(process.returncode, log.read_text())


@pytest.fixture(scope="module")
def server(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """Two API servers, and an engine for each of them on their host; the last test ends it."""
    folder = tmp_path_factory.mktemp("hosts")
    flags = (
        *("--data-parallel-size", "3", "--data-parallel-address", "127.0.0.1"),
        *("--data-parallel-rpc-port", str(free_port())),
    )
    local = ("--data-parallel-size-local", "2", "--api-server-count", "2")
    with (
        engine_of_another_host(demo_checkpoint, folder / "headless.txt", *flags),
        starting_server(demo_checkpoint, folder / "log.txt", *flags, *local) as started,
    ):
        started.wait_until_healthy()
        server = Asked(started)
        server.look()
        yield server


def ask(server: Asked, seed: int, **more: Any) -> Any:
    """The choice of a chat about a picture, with its embedding."""
    image = {"type": "image_url", "image_url": {"url": data_url(png(picture(seed).image))}}
    messages: list[Any] = [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]
    response = server.client.chat.completions.create(
        model="demo",
        messages=messages,
        temperature=0,
        max_tokens=24,
        extra_body={"return_mm_embedding": True},
        **more,
    )
    return response.choices[0]


def test_every_engine_answers_as_one_does(server: Asked, demo_reference: Reference) -> None:
    """Those that come together go to all; a header asks for one of them."""
    before = metrics_by_engine(server.server.address)
    seeds = [0, 1, 2, 3] * 3
    choices = list(server.threads.map(lambda seed: (seed, ask(server, seed)), seeds))
    for engine in ENGINES:
        choices.append((4, ask(server, 4, extra_headers={"X-data-parallel-rank": engine})))
    for seed in range(5):
        image = picture(seed).image
        expected = answer(demo_reference, QUESTION, image)
        prompt = f"<|user|>\n<image>\n{QUESTION}\n<|assistant|>\n"
        features = demo_reference.features(prompt, [image])
        found = [choice for asked_for, choice in choices if asked_for == seed]
        assert len(found) == 3
        for choice in found:
            assert choice.message.content == expected
            assert relative_error(decode_mm_embedding(choice.mm_embedding), features) < 1e-4
    after = metrics_by_engine(server.server.address)
    returned = {
        engine: after[engine]["mm_embeddings_returned_total"]
        - before[engine]["mm_embeddings_returned_total"]
        for engine in ENGINES
    }
    assert sum(returned.values()) == len(choices)
    assert min(returned.values()) >= 2  # the one that was asked for by name, and another


def test_engines_of_one_host_run_on_cores_of_their_own(server: Asked) -> None:
    """Every thread of theirs; an engine with a host to itself runs on all of its cores."""
    cores = {
        process.name(): {
            frozenset(psutil.Process(thread.id).cpu_affinity()) for thread in process.threads()
        }
        for process in psutil.Process().children(recursive=True)
        if "EngineCore_DP" in process.name()
    }
    (first,), (second,), (alone,) = (cores[f"VLLM::EngineCore_DP{number}"] for number in ENGINES)
    assert first
    assert second
    assert not first & second
    assert alone == frozenset(psutil.Process().cpu_affinity())
    printed = server.server.log.read_text()
    for number in ENGINES[:2]:
        assert f"Engine {number} of the 2 on this host runs on " in printed


def test_an_engine_that_dies_ends_the_server(server: Asked) -> None:
    """The engine of the other host stays, until that is told to end."""
    server.process("EngineCore_DP1").kill()
    server.ends(1, "EngineCore_DP1 died unexpectedly")

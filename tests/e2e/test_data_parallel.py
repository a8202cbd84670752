# SPDX-License-Identifier: Apache-2.0
"""Two data-parallel engines behind one address: on one host, and on two.

The second host is a process of its own on this one, which knows the first by its address alone.
"""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.e2e.engines import relative_error
from tests.e2e.exits import check_end
from tests.e2e.serving import (
    Served,
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
ENGINES = ("0", "1")


@contextlib.contextmanager
def one_host(checkpoint: Path, folder: Path) -> Iterator[Served]:
    """An API server for each engine, which is vLLM's default."""
    with starting_server(checkpoint, folder / "log.txt", "--data-parallel-size", "2") as served:
        yield served


@contextlib.contextmanager
def two_hosts(checkpoint: Path, folder: Path) -> Iterator[Served]:
    """One API server and engine, and an engine without API server."""
    flags = (
        *("--data-parallel-size", "2", "--data-parallel-size-local", "1"),
        *("--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(free_port())),
    )
    headless = ("--headless", "--data-parallel-start-rank", "1")
    log = folder / "headless.txt"
    with (
        log.open("w") as output,
        subprocess.Popen(
            serve_command(checkpoint, 0, *flags, *headless),
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            with starting_server(
                checkpoint, folder / "log.txt", *flags, "--api-server-count", "1"
            ) as served:
                yield served
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    check_end(process.returncode, log.read_text())


@pytest.fixture(scope="module", params=[one_host, two_hosts], ids=lambda each: each.__name__)
def served(
    request: pytest.FixtureRequest,
    demo_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param.__name__)
    with request.param(demo_checkpoint, folder) as served:
        served.wait_until_healthy()
        yield served


def ask(client: openai.OpenAI, seed: int, **more: Any) -> Any:
    """The choice of a chat about a picture, with its embedding."""
    image = {"type": "image_url", "image_url": {"url": data_url(png(picture(seed).image))}}
    messages: list[Any] = [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]
    response = client.chat.completions.create(
        model="demo",
        messages=messages,
        temperature=0,
        max_tokens=24,
        extra_body={"return_mm_embedding": True},
        **more,
    )
    return response.choices[0]


def test_both_engines_answer_as_one_does(served: Served, demo_reference: Reference) -> None:
    """Those that come together go to both; a header asks for one of them."""
    before = metrics_by_engine(served.address)
    with (
        openai.OpenAI(base_url=f"{served.address}/v1", api_key="unused", max_retries=0) as client,
        ThreadPoolExecutor(8) as threads,
    ):
        choices = list(threads.map(lambda seed: ask(client, seed), [0, 1, 2, 3] * 2))
        for engine in ENGINES:
            choices.append(ask(client, 4, extra_headers={"X-data-parallel-rank": engine}))
    for seed, choice in zip([0, 1, 2, 3, 0, 1, 2, 3, 4, 4], choices, strict=True):
        image = picture(seed).image
        assert choice.message.content == answer(demo_reference, QUESTION, image)
        prompt = f"<|user|>\n<image>\n{QUESTION}\n<|assistant|>\n"
        features = demo_reference.features(prompt, [image])
        assert relative_error(decode_mm_embedding(choice.mm_embedding), features) < 1e-4
    after = metrics_by_engine(served.address)
    returned = {
        engine: after[engine]["mm_embeddings_returned_total"]
        - before[engine]["mm_embeddings_returned_total"]
        for engine in ENGINES
    }
    assert sum(returned.values()) == len(choices)
    assert min(returned.values()) >= 2  # the one that was asked for by name, and another


def test_engines_of_one_host_run_on_cores_of_their_own(
    served: Served, request: pytest.FixtureRequest
) -> None:
    """Every thread of theirs; engines with a host to themselves run on all of its cores."""
    root = psutil.Process(served.process.pid)
    cores = [
        {frozenset(psutil.Process(thread.id).cpu_affinity()) for thread in engine.threads()}
        for engine in root.children(recursive=True)
        if "EngineCore" in " ".join(engine.cmdline())
    ]
    printed = served.log.read_text()
    if "two_hosts" in request.node.name:
        assert cores == [{frozenset(psutil.Process().cpu_affinity())}]
        assert "on this host runs on" not in printed
        return
    first, second = (of_threads for (of_threads,) in cores)
    assert not first & second
    for number in ENGINES:
        assert f"Engine {number} of the 2 on this host runs on " in printed

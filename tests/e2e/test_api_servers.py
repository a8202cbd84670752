# SPDX-License-Identifier: Apache-2.0
"""One API server and several (``--api-server-count``): what they answer and how they end.

Both are started with keys, a bound on their queue, a time for their end, the length that fits the
memory, and this package as the only plugin of vLLM's.
"""

import contextlib
import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch

from tests.e2e.engines import relative_error
from tests.e2e.exits import check_end
from tests.e2e.serving import START_SECONDS, Served, data_url, metrics, png, starting_server
from tests.e2e.test_server import picture
from tests.reference import Reference
from vllm_spyre_mm.payload import decode_mm_embedding
from vllm_spyre_mm.vllm_fixes.shutdown_errors import SHUT_DOWN

KEY = "a key of the test's"
MAX_QUEUED = 8
SHUTDOWN_SECONDS = 4
"""Longer than ``SHORT`` tokens take and shorter than ``ENDLESS`` ones."""
SHORT, ENDLESS = 50, 4000
KV_CACHE_BLOCKS = 80
BLOCK_BYTES = 64 * 4096
FLAGS = (
    *("--api-key", KEY),
    *("--max-num-queued-reqs", str(MAX_QUEUED)),
    *("--shutdown-timeout", str(SHUTDOWN_SECONDS)),
    *("--max-model-len", "auto"),
    *("--kv-cache-memory-bytes", str(KV_CACHE_BLOCKS * BLOCK_BYTES)),
)
QUESTION = "What is in the picture?"
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]})


class Stream:
    """A request over a connection of its own, of whose answer a piece has come."""

    def __init__(self, address: str, body: dict[str, Any], max_tokens: int) -> None:
        self.client = openai.OpenAI(
            base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60
        )
        self.events = self.client.chat.completions.create(
            model="demo",
            stream=True,
            temperature=0,
            messages=body["messages"],
            extra_body={**body, "max_tokens": max_tokens, "ignore_eos": True},
        )
        next(self.events)

    def close(self) -> None:
        """Go away, as a client may that has waited long enough."""
        self.events.close()
        self.client.close()

    def end(self) -> Any:
        """The choice that finishes the answer."""
        *_, last = (each.choices[0] for each in self.events if each.choices)
        return last


@dataclass(frozen=True)
class Keyed:
    """A server with :data:`FLAGS`, and a client that has its key.

    Attributes:
        count: of its API servers.
        streams: are closed when the test ends.
    """

    count: int
    served: Served
    streams: contextlib.ExitStack

    def ask(self, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
        """Status and content of an answer: to POST, or to GET where there is no body."""
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.served.address + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stream(self, max_tokens: int, body: dict[str, Any]) -> Stream:
        stream = Stream(self.served.address, body, max_tokens)
        self.streams.callback(stream.close)
        return stream

    def spread(self, max_tokens: int, body: dict[str, Any]) -> list[Stream]:
        """Streams, as many as it takes for each API server to have one."""
        streams = [self.stream(max_tokens, body)]
        while self.connected() < self.count:
            assert len(streams) < MAX_QUEUED - 1
            streams.append(self.stream(max_tokens, body))
        return streams

    def connected(self) -> int:
        """Processes of the server that a client is connected to."""
        root, port = psutil.Process(self.served.process.pid), int(self.served.address[-5:])
        return sum(
            any(
                each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED
                for each in process.net_connections("tcp")
            )
            for process in (root, *root.children(recursive=True))
        )


@pytest.fixture(scope="module")
def servers(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """By the number of their API servers; they start together."""
    folder = tmp_path_factory.mktemp("api_servers")
    with contextlib.ExitStack() as stack:
        yield {
            count: stack.enter_context(
                starting_server(
                    demo_checkpoint,
                    folder / f"{count}.txt",
                    *FLAGS,
                    *("--api-server-count", str(count)),
                    environment={"VLLM_PLUGINS": "spyre_mm", "OMP_NUM_THREADS": "1"},
                )
            )
            for count in (1, 2)
        }


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "two"])
def started(request: pytest.FixtureRequest, servers: dict[int, Served]) -> tuple[int, Served]:
    """When each of its API servers is there; the last test with it ends it."""
    served = servers[request.param]
    served.wait_until_healthy()
    deadline = time.monotonic() + START_SECONDS
    while served.log.read_text().count("Application startup complete") < request.param:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return request.param, served


@pytest.fixture
def server(started: tuple[int, Served]) -> Iterator[Keyed]:
    with contextlib.ExitStack() as streams:
        yield Keyed(*started, streams)


def part(seed: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(png(picture(seed).image))}}


def about(seed: int) -> dict[str, Any]:
    """A chat about a picture that wants its embedding."""
    content = [part(seed), {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": 4, "return_mm_embedding": True}


def features(reference: Reference, seed: int) -> torch.Tensor:
    prompt = f"<|user|>\n<image>\n{QUESTION}\n<|assistant|>\n"
    return reference.features(prompt, [picture(seed).image])


def test_each_api_server_returns_embeddings(server: Keyed, demo_reference: Reference) -> None:
    expected = features(demo_reference, 0)
    for stream in server.spread(200, about(0)):
        embedding = decode_mm_embedding(stream.end().mm_embedding)
        assert relative_error(embedding, expected) < 1e-4
    status, answer = server.ask("/v1/mm_embeddings", {"input": [part(0)]})
    assert status == 200
    assert relative_error(decode_mm_embedding(answer["mm_embedding"]), expected) < 1e-4


def grown(server: Keyed, before: dict[str, float], returned: int) -> dict[str, float]:
    """What metrics count since then, once so many embeddings were returned: a step's statistics
    come after its output."""
    deadline = time.monotonic() + 60
    while True:
        found = {
            name: value - before[name] for name, value in metrics(server.served.address).items()
        }
        if found["mm_embeddings_returned_total"] >= returned:
            return found
        assert time.monotonic() < deadline, found


def test_metrics_count_the_requests_of_all_api_servers(server: Keyed) -> None:
    before = metrics(server.served.address)
    streams = server.spread(200, about(20))
    for stream in streams:
        stream.end()
    assert grown(server, before, len(streams)) == {
        "mm_embedding_held_bytes": 0,
        "encoder_runs_total": 1,
        "encoder_cache_hits_total": len(streams) - 1,
        "mm_embeddings_returned_total": len(streams),
    }


@pytest.mark.parametrize("key", [None, "another"])
@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/mm_embeddings", {"input": [part(1)]}), ("/v1/chat/completions", about(1))],
    ids=["images alone", "chat"],
)
def test_without_the_key_there_is_no_embedding(
    server: Keyed, path: str, body: Any, key: str | None
) -> None:
    before = metrics(server.served.address)
    assert server.ask(path, body, key) == (401, {"error": "Unauthorized"})
    status, answer = server.ask(path, body)
    assert status == 200
    assert '"mm_embedding": {' in json.dumps(answer)
    assert grown(server, before, 1)["mm_embeddings_returned_total"] == 1


def test_a_full_queue_refuses_with_a_sentence_and_the_next_request_works(server: Keyed) -> None:
    for _ in range(MAX_QUEUED):
        server.stream(ENDLESS, about(2))
    for path, body in (("/v1/mm_embeddings", {"input": [part(2)]}), CHAT):
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        # Each API server has its part of the queue; the system chooses whose a request is.
        while (reply := server.ask(path, body))[0] == 200:
            assert time.monotonic() < deadline
        status, answer = reply
        assert status == 503
        assert "cannot accept new requests" in answer["error"]["message"]
    server.streams.close()
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    while (status := server.ask("/v1/mm_embeddings", {"input": [part(2)]})[0]) == 503:
        assert time.monotonic() < deadline  # the streams' requests have not ended yet
    assert status == 200


def test_the_length_is_what_fits_the_memory(server: Keyed) -> None:
    """One block is nobody's. Each API server knows what the engine found."""
    longest = (KV_CACHE_BLOCKS - 1) * 64
    server.spread(ENDLESS, about(2))
    for _ in range(4):
        _, models = server.ask("/v1/models")
        assert [model["max_model_len"] for model in models["data"]] == [longest]
        status, answer = server.ask("/v1/completions", {"prompt": [100] * (longest + 1)})
        assert status == 400
        assert f"maximum context length is {longest} tokens" in answer["error"]["message"]
    server.streams.close()
    status, answer = server.ask("/v1/completions", {"prompt": [100] * (longest - 1)})
    assert status == 200
    assert answer["usage"]["total_tokens"] == longest


def test_requests_have_the_shutdown_timeout_to_finish(server: Keyed) -> None:
    """Those that need longer, and those that come after the signal, are told to go elsewhere."""
    endless, short = server.spread(ENDLESS, about(4)), server.stream(SHORT, about(4))
    process, log = server.served.process, server.served.log
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    while log.read_text().count("API server: stopping engine client") < server.count:
        assert time.monotonic() - started < SHUTDOWN_SECONDS
    status, answer = server.ask(*CHAT)
    assert (status, answer["error"]["message"]) == (503, SHUT_DOWN)
    end = short.end()
    assert end.finish_reason == "length"
    assert end.mm_embedding
    assert time.monotonic() - started < SHUTDOWN_SECONDS
    for stream in endless:
        with pytest.raises(openai.APIError, match=SHUT_DOWN):
            stream.end()
    assert time.monotonic() - started > SHUTDOWN_SECONDS / 2
    check_end(process.wait(60), log.read_text())

# SPDX-License-Identifier: Apache-2.0
"""A server that is asked by many clients while it is broken or told to end."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
from PIL import Image

from tests.e2e.faulty.faulty_encoder import STALLED, STALLS
from tests.e2e.serving import Served, chat, data_url, png
from tests.e2e.test_server import picture

QUESTION = "What is in the picture?"
BOUND_SECONDS = 60.0
MAX_MODEL_LEN, ENDLESS = 8192, 6000
"""Tokens; so many are more than an answer gets, in any test, until it is ended."""


def shared_memory() -> set[str]:
    """What the server's kind of processes leaves in shared memory."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp-"))}


def faulty(fault: int) -> str:
    return data_url(png(Image.new("RGB", (96, 96), (fault, 0, 0))))


def good(seed: int) -> str:
    return data_url(png(picture(seed).image))


class Asked:
    """A server, its processes as they were while it ran, and clients that ask at the same time."""

    def __init__(self, server: Served) -> None:
        self.server = server
        self.client = openai.OpenAI(
            base_url=f"{server.address}/v1", api_key="unused", max_retries=0, timeout=BOUND_SECONDS
        )
        self.threads = ThreadPoolExecutor(16)
        self.processes: list[psutil.Process] = []
        self.mapped: set[str] = set()

    def look(self) -> None:
        """Note the processes and the shared memory that they use."""
        root = psutil.Process(self.server.process.pid)
        self.processes = [root, *root.children(recursive=True)]
        for process in self.processes:
            paths = (Path(each.path) for each in process.memory_maps())
            self.mapped |= {path.name for path in paths if path.parent == Path("/dev/shm")}

    def process(self, name: str) -> psutil.Process:
        return next(each for each in self.processes if name in each.name())

    def ask(self, *urls: str, **more: object) -> "Future[str]":
        return self.threads.submit(chat, self.client, QUESTION, *urls, **more)

    def load(self, count: int = 6) -> "list[Future[str]]":
        """Requests that go on until they are ended, when the server has taken all of them."""
        body = {"ignore_eos": True, "max_tokens": ENDLESS}
        return self.taken(lambda seed: self.ask(good(seed), extra_body=body), count)

    def stall(self, fault: int = STALLS) -> "list[Future[str]]":
        """Ask for a step that does not end by itself, and wait until it is under way."""
        requests = self.taken(lambda _: self.ask(faulty(fault)))
        self.wait_for(lambda: STALLED in self.server.log.read_text())
        return requests

    def taken(self, ask: "Callable[[int], Future[str]]", count: int = 1) -> "list[Future[str]]":
        """Ask so often, and wait until the server has taken the requests."""

        def so_far() -> int:
            return self.server.log.read_text().count("Added request ")

        before = so_far()
        requests = [ask(number) for number in range(count)]
        self.wait_for(lambda: so_far() == before + count)
        return requests

    def wait_for(self, condition: Callable[[], bool], seconds: float = BOUND_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.server.log.read_text()[-3000:]
            time.sleep(0.05)

    def ends(self, status: int, sentence: str) -> None:
        """The server ends with a status and a sentence, and nothing of it stays behind."""
        assert self.server.process.wait(BOUND_SECONDS) == status
        assert sentence in self.server.log.read_text()
        self.wait_for(lambda: not [each for each in self.processes if _runs(each)])
        self.wait_for(lambda: not self.mapped & shared_memory())


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.contextmanager
def asked(server: Served) -> Iterator[Asked]:
    """A server that has been started, when it is ready."""
    server.wait_until_healthy()
    asked = Asked(server)
    asked.look()
    try:
        yield asked
    finally:
        for process in asked.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        asked.threads.shutdown()

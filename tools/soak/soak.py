# SPDX-License-Identifier: Apache-2.0
"""The soak itself: answers alone, a baseline, the traffic, and what is left of it."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.e2e.serving import Served, starting_server
from tools.soak.client import Answer, Client, Leave, Left, RequestError, same_answer
from tools.soak.state import INSPECTOR, State, preemptions, resident_bytes, settled_state
from tools.soak.traffic import MAX_MODEL_LEN, SoakRequest, request_pool, stream_of
from vllm_spyre_mm.demo import checkpoint_path

SERVER_FLAGS = (
    "--max-model-len",
    str(MAX_MODEL_LEN),
    "--max-num-batched-tokens",
    "128",
    "--max-num-seqs",
    "8",
    "--kv-cache-memory-bytes",
    "12M",
)
"""Chunks, queues and preemptions: prompts are longer than a chunk, and the cache is too small."""

STAND_IN = Path(__file__).parents[2] / "tests" / "e2e" / "stand_in"

LEAVING = 0.45
"""Share of the requests whose client means to go away; about a third do before their end."""


@dataclass(frozen=True)
class SoakOptions:
    """What to do.

    Attributes:
        requests: stop after so many.
        seconds: stop after so long.
        outstanding: requests under way at any time. As long as it is more than the engine runs
            together, requests queue: the rate is above capacity, whatever the machine.
        pool: distinct requests.
        seed: of everything that is random.
    """

    requests: int = 5000
    seconds: float = float("inf")
    outstanding: int = 48
    pool: int = 64
    seed: int = 0


@dataclass
class SoakResult:
    """What happened.

    Attributes:
        endings: how many requests ended in which way.
        wrong: what went wrong, a line each.
        seconds: of the traffic.
        preemptions: of the engine.
        evicted: images that the encoder cache had no more room for.
        resident: samples of memory: requests that had ended, and bytes by process.
        late: steps, at most, that a request took part in after its abort had arrived.
        grown: what the processes hold in the end and did not before.
    """

    endings: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    preemptions: int = 0
    evicted: int = 0
    resident: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    late: int = 0
    grown: list[str] = field(default_factory=list)

    def growth(self) -> dict[str, float]:
        """By process: memory in the last tenth over that after the first half, less 1."""
        total = self.resident[-1][0]
        return {
            name: _mean(self.resident, name, 0.9 * total, total)
            / _mean(self.resident, name, 0.5 * total, 0.6 * total)
            - 1
            for name in self.resident[-1][1]
        }


def _mean(samples: list[tuple[int, dict[str, int]]], name: str, first: float, last: float) -> float:
    chosen = [figures[name] for ended, figures in samples if first <= ended <= last]
    return sum(chosen) / len(chosen)


def soaked_server(
    log: Path, *, defaults: bool = False, stand_in: bool = False
) -> AbstractContextManager[Served]:
    """A server of the embedded checkpoint with the inspector, which is starting.

    Args:
        log: file for what it prints.
        defaults: with the default dtype and compiled, instead of fp32 and eager.
        stand_in: on the stand-in for a card, with the defaults and an encoder's process.
    """
    return starting_server(
        checkpoint_path(),
        log,
        *SERVER_FLAGS,
        plugins=[INSPECTOR, STAND_IN] if stand_in else [INSPECTOR],
        # The model is tiny: threads would only wait for each other.
        environment={"VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"},
        defaults=defaults or stand_in,
    )


class Soak:
    """Drives one server.

    Args:
        address: of the server.
        root: its process id.
        options: what to do.
    """

    def __init__(self, address: str, root: int, options: SoakOptions) -> None:
        self.address, self.root, self.options = address, root, options
        self.rng = random.Random(f"traffic-{options.seed}")
        self.pool = request_pool(options.pool, options.seed)
        self.alone: list[Answer] = []
        self.latency = 1.0
        self.result = SoakResult()

    async def run(self) -> SoakResult:
        """Ask each request alone, take the baseline after a first burst, then soak."""
        async with self._session() as session:
            client = Client(session)
            self.alone = [await client.ask(request) for request in self.pool]
        await self._traffic(2 * self.options.outstanding, float("inf"))
        preempted = await preemptions(self.address)
        baseline = await settled_state(self.address, self.root)
        self.result = SoakResult(wrong=self.result.wrong)
        started = time.monotonic()
        await self._traffic(self.options.requests, self.options.seconds)
        self.result.seconds = time.monotonic() - started
        self.result.preemptions = await preemptions(self.address) - preempted
        state: State = await settled_state(self.address, self.root, baseline)
        self.result.grown = state.more_than(baseline)
        self.result.late = state.work["late"]
        self.result.evicted = state.work["evicted"] - baseline.work["evicted"]
        return self.result

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(self.address, connector=aiohttp.TCPConnector(limit=0))

    async def _traffic(self, requests: int, seconds: float) -> None:
        numbers = iter(range(requests))
        deadline = time.monotonic() + seconds
        sampling = asyncio.create_task(self._sample())
        async with self._session() as session, asyncio.TaskGroup() as group:
            for _ in range(self.options.outstanding):
                group.create_task(self._client(Client(session), numbers, deadline))
        sampling.cancel()

    async def _client(self, client: Client, numbers: Iterator[int], deadline: float) -> None:
        asked = stream_of(self.pool, self.rng)
        for _ in numbers:
            if time.monotonic() > deadline:
                return
            await self._one(client, next(asked))

    async def _one(self, client: Client, request: SoakRequest) -> None:
        stream = request.streams and self.rng.random() < 0.5
        leave = self._leave(stream) if self.rng.random() < LEAVING else None
        started = time.monotonic()
        try:
            answer = await client.ask(request, stream=stream, leave=leave)
        except Left:
            self.result.endings["left"] += 1
            return
        except (RequestError, TimeoutError, aiohttp.ClientError) as error:
            self.result.endings["error"] += 1
            self.result.wrong.append(f"{request.kind}: {type(error).__name__}: {error}")
            return
        self.latency += 0.05 * (time.monotonic() - started - self.latency)
        expected = self.alone[self.pool.index(request)]
        if same_answer(answer, expected):
            self.result.endings["right"] += 1
        else:
            self.result.endings["wrong"] += 1
            self.result.wrong.append(f"{request.kind}: {answer} is not {expected}"[:2000])

    def _leave(self, stream: bool) -> Leave:
        """Now, while it waits, is encoded, prefilled or decoded, or in the middle of its stream."""
        if stream and self.rng.random() < 0.5:
            return Leave(after_events=self.rng.randint(1, 8))
        return Leave(after_seconds=self.rng.uniform(0, self.latency))

    async def _sample(self) -> None:
        while True:
            figures = await asyncio.to_thread(resident_bytes, self.root)
            self.result.resident.append((self.result.endings.total(), figures))
            await asyncio.sleep(1.0)

# SPDX-License-Identifier: Apache-2.0
"""What a server's processes hold, seen from outside and, through the inspector, from inside."""

import asyncio
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil

INSPECTOR = Path(__file__).parent / "inspector"
"""To be on ``PYTHONPATH`` of the server, which wants ``VLLM_SERVER_DEV_MODE=1`` besides."""

SETTLE_SECONDS = 30.0

Figures = dict[str, int]

UNDER_WAY = "under_way"
"""In the names of figures that are 0 when no request is under way."""


@dataclass(frozen=True)
class State:
    """The processes at one moment.

    Attributes:
        figures: by name and process: what may be there and must not become more.
        mentions: places in their memory that name a request.
        work: what the engine has done: ``steps``, images ``encoded`` and ``evicted``, and steps
            that an aborted request took part in too ``late``.
    """

    figures: Figures
    mentions: dict[str, int]
    work: Figures = field(default_factory=dict)

    def more_than(self, baseline: "State") -> list[str]:
        """What is there that was not, or that is under way when nothing is; one line each."""
        before = {name: 0 if UNDER_WAY in name else n for name, n in baseline.figures.items()}
        grown = [
            f"{name}: {before.get(name, 0)} before, {value} after"
            for name, value in self.figures.items()
            if value > before.get(name, 0)
        ]
        return grown + [
            f"{count} request ids in a {where}" for where, count in self.mentions.items()
        ]


TITLES = {"VLLM::EngineCore": "engine", "VLLM::Encoder": "encoder"}
"""Of processes, and what they are called here."""


def processes(root: int) -> dict[str, psutil.Process]:
    """The server and everything it started, by what each is: ``server``, ``engine``, beside a card
    ``encoder``, and others."""
    server = psutil.Process(root)
    found = {"server": server}
    for number, child in enumerate(server.children(recursive=True)):
        title = child.name()
        is_one = [name for known, name in TITLES.items() if title.startswith(known)]
        found[is_one[0] if is_one else f"{title} {number}"] = child
    return found


def resident_bytes(root: int) -> dict[str, int]:
    """Resident memory of the server, its engine, and the encoder's process if there is one."""
    found = processes(root)
    names = ("server", *TITLES.values())
    return {name: found[name].memory_info().rss for name in names if name in found}


def _outside(root: int) -> Figures:
    found = processes(root)
    figures = {"processes": len(found)}
    for name, process in found.items():
        figures[f"open files of the {name}"] = process.num_fds()
        figures[f"threads of the {name}"] = _num_threads(process)
        figures[f"shared memory of the {name}"] = sum(
            mapped.path.startswith("/dev/shm/") for mapped in process.memory_maps()
        )
    return figures


def _num_threads(process: psutil.Process) -> int:
    """Threads, without one of an allocator's that comes with the first memory it gives back."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/comm")
    return sum(task.read_text().strip() != "jemalloc_bg_thd" for task in tasks)


async def _call(address: str, method: str) -> dict[str, dict[str, Any]]:
    """What the inspector says, by process."""
    async with (
        aiohttp.ClientSession(address) as session,
        session.post("/collective_rpc", json={"method": method}) as response,
    ):
        response.raise_for_status()
        server, engine = (await response.json())["results"]
    return {"server": server, "engine": engine}


async def preemptions(address: str) -> int:
    """How many requests the engine has preempted so far."""
    async with aiohttp.ClientSession(address) as session, session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    (line,) = (line for line in lines if line.startswith("vllm:num_preemptions_total{"))
    return int(float(line.rpartition(" ")[2]))


async def take_state(address: str, root: int) -> State:
    """The state of the processes now, without the mentions, which take seconds to find."""
    inside = await _call(address, "soak_counts")
    figures = _outside(root)
    for name, found in inside.items():
        # Executors start their threads when they are needed, up to a bound, and keep them.
        figures[f"threads of the {name}"] -= found["counts"].pop("pool_threads")
        figures |= {f"{what} in the {name}": count for what, count in found["counts"].items()}
    return State(figures, {}, inside["engine"]["work"])


async def settled_state(address: str, root: int, baseline: State | None = None) -> State:
    """The state when nothing is under way: no request, and no more than the baseline has.

    What is still more after :data:`SETTLE_SECONDS` stays.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        await asyncio.sleep(0.5)
        state = await take_state(address, root)
        requests = sum(count for name, count in state.figures.items() if "requests in" in name)
        quiet = not requests and not (baseline and state.more_than(baseline))
        if quiet or time.monotonic() > deadline:
            break
    mentions = {
        f"{where}, in the {name}": count
        for name, found in (await _call(address, "soak_mentions")).items()
        for where, count in found.items()
    }
    return replace(state, mentions=mentions)

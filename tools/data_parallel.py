# SPDX-License-Identifier: Apache-2.0
"""Throughput of two data-parallel engines beside one engine on the same cores.

Both servers run from the start and are asked in turn: ``python -m tools.data_parallel``. Each
request has a picture of its own, so that nothing is in a cache. On a machine that does other work
besides, the time of the cores says more than that of the clock.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import openai
import psutil

from vllm_spyre_mm.compat import ensure_torchvision_importable

ensure_torchvision_importable()  # before Transformers is imported

from benchmarks.checkpoints import SMALL, ensure_checkpoint  # noqa: E402
from benchmarks.machine import this_machine  # noqa: E402
from tests.e2e.serving import data_url, png, starting_server  # noqa: E402
from vllm_spyre_mm.demo.pictures import draw_picture, random_shapes  # noqa: E402

FLAGS = (
    *("--max-model-len", "2048", "--kv-cache-memory-bytes", "1G", "--max-num-seqs", "16"),
    "--no-enable-prefix-caching",
)


def picture(number: int, side: int) -> str:
    """A picture as a URL that holds it."""
    rng = random.Random(f"data parallel {number}")
    return data_url(png(draw_picture(random_shapes(rng, 2), (side, side), rng=rng).image))


async def seconds_for(address: str, pictures: list[str], tokens: int) -> float:
    """Until all of the requests, which come together, are answered."""
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:

        async def ask(url: str) -> None:
            await client.chat.completions.create(
                model="demo",
                messages=[
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": url}},
                            {"type": "text", "text": "What is in the picture?"},
                        ],
                    }
                ],
                max_tokens=tokens,
                extra_body={"ignore_eos": True},
            )

        started = time.perf_counter()
        await asyncio.gather(*map(ask, pictures))
        return time.perf_counter() - started


def core_seconds(process_id: int) -> float:
    """Time that a server's processes have had of the cores so far."""
    server = psutil.Process(process_id)
    times = [each.cpu_times() for each in (server, *server.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=16, help="that come together")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--side", type=int, default=448, help="of a picture, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    numbers = itertools.count()
    print(f"{this_machine().title}; {os.getloadavg()[0]:.1f} other processes", flush=True)
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        checkpoint = ensure_checkpoint(SMALL, Path(folder))
        servers = {
            engines: stack.enter_context(
                starting_server(
                    checkpoint,
                    Path(folder) / f"{engines}.txt",
                    *FLAGS,
                    *("--data-parallel-size", str(engines)),
                    defaults=True,
                )
            )
            for engines in found
        }
        for server in servers.values():
            server.wait_until_healthy()
        for number in range(options.rounds + 1):
            for engines, server in servers.items():
                pictures = [picture(next(numbers), options.side) for _ in range(options.requests)]
                before = core_seconds(server.process.pid)
                seconds = asyncio.run(seconds_for(server.address, pictures, options.tokens))
                used = core_seconds(server.process.pid) - before
                print(f"round {number}, engines: {engines}, {seconds:.2f} s, {used:.1f} core-s")
                if number:  # the first one warms up
                    found[engines].append((seconds, used))
    for what, figures in enumerate(("requests a second", "requests a core-second")):
        one, two = (
            options.requests / statistics.median(each[what] for each in found[engines])
            for engines in found
        )
        print(f"{figures}: {one:.3f} of one engine, {two:.3f} of two, {two / one:.2f} times")


if __name__ == "__main__":
    main()

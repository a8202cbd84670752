# SPDX-License-Identifier: Apache-2.0
"""A client that goes away takes its request with it: no more work, and room for the others."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from tests.e2e.serving import Served, data_url, png
from tools.soak.client import Client, Leave, Left
from tools.soak.state import Figures, State, settled_state, take_state
from tools.soak.traffic import SoakRequest
from vllm_spyre_mm.demo import pictures

CLIENTS = 100
ROWS = 8  # of soaked_server
LONG = 400


@asynccontextmanager
async def asking(server: Served) -> AsyncIterator[Client]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.address, connector=connector) as session:
        yield Client(session)


def image_part(seed: int) -> dict[str, Any]:
    rng = random.Random(f"aborts-{seed}")
    drawn = pictures.draw_picture(pictures.random_shapes(rng, 1), (64, 64), rng=rng)
    return {"type": "image_url", "image_url": {"url": data_url(png(drawn.image))}}


def chat(seed: int, max_tokens: int = LONG, **more: Any) -> SoakRequest:
    """A request about a picture of its own, which goes on until it is told to end."""
    content = [image_part(seed), {"type": "text", "text": "What is in the picture?"}]
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "ignore_eos": max_tokens == LONG,
        "temperature": 0,
        **more,
    }
    return SoakRequest("chat", "/v1/chat/completions", body)


def embedding_alone(seed: int) -> SoakRequest:
    body = {"input": [image_part(seed)]}
    return SoakRequest("embedding alone", "/v1/mm_embeddings", body, streams=False)


def text() -> SoakRequest:
    body = {"model": "demo", "prompt": [7] * 20, "max_tokens": 900, "ignore_eos": True}
    return SoakRequest("text", "/v1/completions", body)


async def left(asked: Awaitable[Any]) -> None:
    with pytest.raises(Left):
        await asked


async def work_of(server: Served) -> State:
    return await take_state(server.address, server.process.pid)


async def until(server: Served, condition: Callable[[Figures], bool]) -> None:
    while not condition((await work_of(server)).figures):
        await asyncio.sleep(0.1)


async def stop(tasks: list[asyncio.Task[Any]]) -> None:
    """Close their connections."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))


def test_the_next_request_does_not_wait_for_a_hundred_that_were_cancelled(soaked: Served) -> None:
    """They would be thousands of steps; what is left of them is a few, and the next one's own."""

    async def test() -> None:
        rng = random.Random(0)
        async with asking(soaked) as client:
            alone = await client.ask(chat(-1, 24), stream=True)
        async with asking(soaked) as client:
            asked = [
                client.ask(chat(i), stream=True, leave=Leave(after_seconds=rng.uniform(0, 0.5)))
                for i in range(CLIENTS)
            ]
            await asyncio.gather(*map(left, asked))
        before, started = await work_of(soaked), time.monotonic()
        async with asking(soaked) as client:
            assert await client.ask(chat(-1, 24), stream=True) == alone
        seconds = time.monotonic() - started
        steps = (await work_of(soaked)).work["steps"] - before.work["steps"]
        print(f"the next answer came after {steps} steps and {seconds:.1f} s")
        assert steps < CLIENTS * LONG / ROWS / 50
        settled = await settled_state(soaked.address, soaked.process.pid)
        assert not settled.mentions
        assert settled.figures["blocks_in_use in the engine"] == 0
        assert settled.work["late"] <= 1

    run(test)


def test_requests_whose_clients_left_the_queue_are_never_begun(soaked: Served) -> None:
    """All rows are taken when they come, and they are gone when the first becomes free."""

    async def test() -> None:
        async with asking(soaked) as client, asking(soaked) as leaving:
            rows = [asyncio.create_task(client.ask(text())) for _ in range(ROWS)]
            await until(soaked, lambda figures: figures["running in the engine"] == ROWS)
            requests = [
                leaving.ask(chat(201)),
                leaving.ask(chat(202), stream=True),
                leaving.ask(chat(203, n=3, temperature=1.0), stream=True),
                leaving.ask(embedding_alone(204)),
            ]
            waiting = [asyncio.create_task(request) for request in requests]
            await until(soaked, lambda figures: figures["waiting in the engine"] == 6)
            await stop(waiting)
            await until(soaked, lambda figures: not figures["waiting in the engine"])
            after = await work_of(soaked)
            assert after.figures["running in the engine"] == ROWS, "the rows were to outlast them"
            await stop(rows)
        settled = await settled_state(soaked.address, soaked.process.pid)
        assert settled.work["encoded"] == after.work["encoded"]
        assert settled.work["late"] <= 1

    run(test)

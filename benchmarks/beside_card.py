# SPDX-License-Identifier: Apache-2.0
"""Requests with pictures that come while a text is generated, on the stand-in for a card.

A call to it takes time and leaves the host's cores idle, as one to a card does: its results are
made up. What is measured is the host's part alone: nothing here says how fast a card is.
"""

import os
import statistics
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Figure, Row, Timing, compare, constant
from benchmarks.process import Driver

STAND_IN = Path(__file__).parents[1] / "tests" / "e2e" / "stand_in"
CALL_SECONDS = 0.05
"""Of each call to the device."""

ENGINE = {
    "max_model_len": 2048,
    "max_num_seqs": 20,
    "max_num_batched_tokens": 512,
    "limit_mm_per_prompt": {"image": 1},
    "kv_cache_memory_bytes": 1 << 28,
}
SECTION = "pictures beside a stand-in card"
OFF = "encode_ahead off"
MAX_TOKENS = 16


def beside_card_rows(checkpoint: Path, quick: bool) -> Iterator[Row]:
    """With 1, 4 and 16 requests at a time: their first token, the text's, and the device."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "STAND_IN_CALL_SECONDS": str(CALL_SECONDS),
        "STAND_IN_COMPUTES": "0",
        "PYTHONPATH": os.pathsep.join([str(STAND_IN), *filter(None, [os.getenv("PYTHONPATH")])]),
    }
    with (
        Driver(checkpoint, environment=environment, **ENGINE) as ahead,
        Driver(
            checkpoint,
            environment=environment,
            **ENGINE,
            additional_config={"encode_ahead": False},
        ) as off,
    ):
        for requests in (1, 4) if quick else (1, 4, 16):
            found = {}
            for driver, name in ((ahead, "on"), (off, OFF)):
                found[name] = driver.ask(
                    "beside", requests=requests, max_tokens=MAX_TOKENS, seed=1000 * requests
                )
            yield from _rows(f"{requests} request{'s' if requests > 1 else ''}", found)


def _rows(title: str, found: dict[str, dict[str, list[float]]]) -> Iterator[Row]:
    on, off = found["on"], found[OFF]
    for name, key, take in (
        ("mean time to the first token", "first", statistics.mean),
        ("longest time between two tokens of the text", "between", max),
    ):
        yield compare(
            SECTION,
            f"{title}, {name}",
            constant([take(on[key])]),
            constant([take(off[key])]),
            OFF,
            Figure.FASTER,
        )
    alone = statistics.median(on["alone"])
    yield compare(
        SECTION,
        f"{title}, median time between two tokens of the text",
        Timing(tuple(on["between"])),
        constant([alone]),
        "without pictures",
    )
    yield compare(
        SECTION,
        f"{title}, share of time in which the device computes (share)",
        constant([on["busy"]]),
        constant([off["busy"]]),
        OFF,
    )

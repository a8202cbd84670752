# SPDX-License-Identifier: Apache-2.0
"""Beside what people would pick instead: OpenVINO, and Transformers compiled by Inductor.

LLaVA-Next with CLIP and Llama, which they all run. Pictures are square: Optimum's OpenVINO model
takes the rows of a picture's grid for its columns, and refuses any other.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.measure import Figure, Row, Timing, compare
from benchmarks.process import Driver
from benchmarks.serving import ENGINE, KV_BYTES, REST_SECONDS

SECTION = "beside others"
OPENVINO, TRANSFORMERS = "OpenVINO", "Transformers bf16, torch.compile"
TILES, SIDES = 2, (336, 336)
WORKLOAD = {"requests": 1, "max_tokens": 32, "sides": SIDES}
WARMUPS = 2
"""Rounds that do not count: the second is the first whose prompts have another length's graphs."""


def others_rows(checkpoint: Path, openvino: str | None, quick: bool) -> Iterator[Row]:
    """The vision tower alone and one request, on every engine at hand in turn."""
    with contextlib.ExitStack() as stack:
        drivers = {
            name: stack.enter_context(start()) for name, start in _starts(checkpoint, openvino)
        }
        rounds = 2 if quick else 7

        def tower(driver: Driver, seed: int) -> float:
            (seconds,) = driver.ask("tower", tiles=TILES, repeats=1)["seconds"]
            return float(seconds)

        def request(driver: Driver, seed: int) -> float:
            return float(driver.ask("workload", **WORKLOAD, seed=seed)["seconds"])

        yield from _rows(f"vision tower, {TILES} tiles", _in_turn(drivers, tower, rounds))
        yield from _rows("one request, 32 tokens", _in_turn(drivers, request, rounds))


def _starts(checkpoint: Path, openvino: str | None) -> Iterator[tuple[str, Callable[[], Driver]]]:
    """What starts each engine."""
    yield (
        "ours",
        lambda: Driver(
            checkpoint,
            environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            **ENGINE,
            kv_cache_memory_bytes=KV_BYTES,
        ),
    )
    yield (
        TRANSFORMERS,
        lambda: Driver(
            checkpoint,
            kind="transformers",
            imports=("torchvision_schemas",),
            dtype="bfloat16",
            compile=True,
        ),
    )
    if openvino is not None:
        yield OPENVINO, lambda: Driver(checkpoint, kind="openvino", python=openvino)


def _in_turn(
    drivers: Mapping[str, Driver], ask: Callable[[Driver, int], float], rounds: int
) -> dict[str, Timing]:
    """A new picture in every round; threads that have worked come to rest between the engines."""
    seconds: dict[str, list[float]] = {name: [] for name in drivers}
    for number in range(WARMUPS + rounds):
        for name, driver in drivers.items():
            time.sleep(REST_SECONDS)
            taken = ask(driver, number)
            if number >= WARMUPS:
                seconds[name].append(taken)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _rows(name: str, timings: dict[str, Timing]) -> Iterator[Row]:
    ours = timings.pop("ours")
    for other, timing in timings.items():
        yield compare(SECTION, f"{name}, beside {other}", ours, timing, other, Figure.FASTER)
    if OPENVINO not in timings:
        absent = "absent: make bench-openvino"
        yield Row(SECTION, f"{name}, beside {OPENVINO}", ours, reference_name=absent)

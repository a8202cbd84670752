# SPDX-License-Identifier: Apache-2.0
"""Whole requests: beside vLLM's CPU backend and Transformers, with embeddings, and asked again."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import Figure, Row, Timing, compare, constant
from benchmarks.process import Driver

ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "limit_mm_per_prompt": {"image": 1},
}
KV_BYTES = 1 << 28
WORKLOAD = {"requests": 4, "max_tokens": 32}
REST_SECONDS = 1.0
ENCODER_RUNS = "vllm:spyre_encoder_runs"
VLLM_CPU, TRANSFORMERS = "vLLM's CPU backend", "Transformers fp32, one by one"
SECTION = "4 requests, a picture each"


def serving_rows(checkpoint: Path, vllm_cpu: str | None, quick: bool) -> Iterator[Row]:
    """The workload on every engine at hand, in turn."""
    engine = {**ENGINE, "kv_cache_memory_bytes": KV_BYTES}
    with contextlib.ExitStack() as stack:
        drivers = {"ours": stack.enter_context(Driver(checkpoint, **engine))}
        if vllm_cpu is not None:
            drivers[VLLM_CPU] = stack.enter_context(
                Driver(
                    checkpoint,
                    python=vllm_cpu,
                    environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
                    **ENGINE,
                )
            )
        if not quick:
            drivers[TRANSFORMERS] = stack.enter_context(
                Driver(checkpoint, kind="transformers", imports=("torchvision_schemas",))
            )
        timings = _rounds(drivers, rounds=2 if quick else 7)
    ours = timings.pop("ours")
    for name, timing in timings.items():
        yield compare(SECTION, f"beside {name}", ours, timing, name, Figure.FASTER)
    if vllm_cpu is None:
        name = f"beside {VLLM_CPU}"
        yield Row(SECTION, name, ours, reference_name="absent: make bench-reference")


def embedding_row(checkpoint: Path, quick: bool) -> Row:
    """The workload with and without embeddings: in pairs, in one engine, where requests choose."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    engine = {**ENGINE, "kv_cache_memory_bytes": KV_BYTES}
    with Driver(checkpoint, **engine, enable_return_mm_embedding=True) as driver:
        driver.ask("workload", **WORKLOAD, seed=0)
        for number in range(6 if quick else 20):
            for order, chosen in enumerate((True, False) if number % 2 else (False, True)):
                answer = driver.ask(
                    "workload",
                    **WORKLOAD,
                    seed=1000 * (number + 1) + 100 * order,
                    extra_args={"return_mm_embedding": chosen},
                )
                seconds[chosen].append(answer["seconds"])
    return compare(
        SECTION,
        "embeddings returned",
        constant(seconds[True]),
        constant(seconds[False]),
        "not returned",
        paired=True,
    )


def _rounds(drivers: dict[str, Driver], rounds: int) -> dict[str, Timing]:
    """New pictures in every round; the first is not counted. The slowest takes one round.

    Threads that have worked spin for a while before they sleep; the next engine waits for that.
    """
    seconds: dict[str, list[float]] = {name: [] for name in drivers}
    for number in range(rounds + 1):
        for name, driver in drivers.items():
            if name == TRANSFORMERS and number > 1:
                continue
            time.sleep(REST_SECONDS)
            answer = driver.ask("workload", **WORKLOAD, seed=100 * number)
            if number:
                seconds[name].append(answer["seconds"])
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def again_row(checkpoint: Path, quick: bool) -> Row:
    """The same picture asked about again: features, pixels and prefix are cached."""
    first, second = [], []
    with Driver(checkpoint, **ENGINE, kv_cache_memory_bytes=KV_BYTES) as driver:
        driver.ask("workload", requests=1, max_tokens=1, seed=1)
        for number in range(3 if quick else 7):
            for taken in (first, second):
                answer = driver.ask("workload", requests=1, max_tokens=1, seed=1000 * (number + 1))
                taken.append(answer["seconds"])
    return compare(
        "the same picture again",
        "time to the first token",
        constant(second),
        constant(first),
        "first time",
        Figure.FASTER,
    )


def evicted_rows(checkpoint: Path) -> Iterator[Row]:
    """The same picture again when its features have been evicted: runs of the encoder.

    With embeddings one run makes them anew; without, the prefix that is cached covers the picture.
    """
    engine = {
        **ENGINE,
        "kv_cache_memory_bytes": KV_BYTES,
        "enable_return_mm_embedding": True,
        "additional_config": {"encoder_cache_tokens": 1},  # raised to one picture's
        "disable_log_stats": False,
    }
    with Driver(checkpoint, **engine) as driver:

        def ask(seed: int, chosen: bool) -> None:
            driver.ask(
                "workload",
                requests=1,
                max_tokens=1,
                seed=seed,
                extra_args={"return_mm_embedding": chosen},
                question="What is in the picture? " * 40,  # the picture lies in whole blocks
            )

        for chosen in (True, False):
            ask(1, chosen)
            ask(2, chosen)  # takes the place of the first one's features
            before = driver.ask("count", metric=ENCODER_RUNS)["value"]
            ask(1, chosen)
            runs = driver.ask("count", metric=ENCODER_RUNS)["value"] - before
            yield Row(
                section="features evicted, the same picture again",
                name=f"embeddings {'on' if chosen else 'off'} (encoder runs)",
                measured=constant(runs),
                figure=Figure.COUNT,
            )

# SPDX-License-Identifier: Apache-2.0
"""What a decode step does around the model, beside vLLM's own scheduler and sampler."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Figure, Row, Timing, compare
from benchmarks.process import Driver
from benchmarks.serving import ENGINE

SECTION = "host work"
CONTEXT = 256
REFERENCE = "vLLM's scheduler and sampler alone"


def host_work_rows(checkpoint: Path, quick: bool) -> Iterator[Row]:
    """Steps of 1, 4 and 16 sequences, each in turn with one of vLLM's own."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    engine = {**ENGINE, "kv_cache_memory_bytes": 1 << 29, "enable_prefix_caching": False}
    with Driver(checkpoint, environment=environment, **engine) as driver:
        for batch in (1, 4, 16):
            answer = driver.ask(
                "host_work", batch=batch, context=CONTEXT, steps=32 if quick else 128
            )
            ours, theirs = answer["ours"], answer["reference"]
            total = _timing(ours, "total"), _timing(theirs, "total")
            yield compare(SECTION, f"a step of {batch}", *total, REFERENCE)
    for part in ("schedule", "sampler", "bookkeeping"):
        parts = _timing(ours, part), _timing(theirs, part)
        yield compare(SECTION, f"of it, {part} of {batch}", *parts, f"vLLM's {part}")
    runner = _timing(ours, "runner")
    yield Row(SECTION, f"of it, the runner's of {batch}", runner, figure=Figure.VALUE)


def _timing(steps: list[dict[str, float]], part: str) -> Timing:
    return Timing(tuple(step[part] for step in steps))

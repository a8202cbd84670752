# SPDX-License-Identifier: Apache-2.0
"""What a decode step does around the model, beside vLLM's own scheduler and sampler."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Row, Timing, compare
from benchmarks.process import Driver
from benchmarks.serving import ENGINE

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
            ours, theirs = (Timing(tuple(answer[name])) for name in ("ours", "reference"))
            yield compare("host work", f"a step of {batch}", ours, theirs, REFERENCE)

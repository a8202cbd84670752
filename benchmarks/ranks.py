# SPDX-License-Identifier: Apache-2.0
"""The time to encode a picture with two tensor-parallel ranks, beside one with the same threads."""

import contextlib
from pathlib import Path

from benchmarks.measure import Row, compare, constant
from benchmarks.process import Driver
from benchmarks.serving import ENGINE

KV_BYTES = 1 << 26
WORKLOAD = {"requests": 1, "max_tokens": 1, "sides": (384, 384)}
FEATURES_ALONE = {"return_mm_embedding": {"generate": False}}


def two_ranks_row(checkpoint: Path, quick: bool) -> Row:
    """Requests for a picture's features alone, in turn on an engine of one rank and one of two.

    The decoder does not run for them: what is left is the picture's preparation, the encoder, and
    the way of the features to the other rank and to the client.
    """
    engine = {**ENGINE, "kv_cache_memory_bytes": KV_BYTES, "enable_return_mm_embedding": True}
    seconds: dict[int, list[float]] = {2: [], 1: []}
    with contextlib.ExitStack() as stack:
        drivers = {
            ranks: stack.enter_context(Driver(checkpoint, tensor_parallel_size=ranks, **engine))
            for ranks in seconds
        }
        for number in range(4 if quick else 16):
            for order, (ranks, driver) in enumerate(drivers.items()):
                seed = 100 * number + order
                answer = driver.ask("workload", **WORKLOAD, seed=seed, extra_args=FEATURES_ALONE)
                if number:  # the first is not counted
                    seconds[ranks].append(answer["seconds"])
    return compare(
        "vision tower",
        "a picture of 2 tiles, two ranks",
        constant(seconds[2]),
        constant(seconds[1]),
        "one rank, as many threads",
        paired=True,
    )

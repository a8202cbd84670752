# SPDX-License-Identifier: Apache-2.0
"""Decode steps beside what reading their weights and keys takes."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from benchmarks.ceilings import CeilingRead
from benchmarks.checkpoints import SMALL
from benchmarks.measure import Row, compare, constant, interleaved
from benchmarks.process import Driver
from benchmarks.serving import ENGINE

CONTEXT = 1000
BYTES = 2
"""Of a bf16 number."""


def decode_rows(checkpoint: Path, quick: bool) -> Iterator[Row]:
    """1, 4 and 16 sequences; the engine runs in the measured process.

    Memory is read, all threads at once, before, between and after the steps of each.
    """
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    engine = {**ENGINE, "kv_cache_memory_bytes": 1 << 29, "enable_prefix_caching": False}
    read = CeilingRead()
    with Driver(checkpoint, environment=environment, **engine) as driver:
        for batch in (1, 4, 16):
            reads = interleaved({"read": read}, 5)["read"].seconds
            total = []
            for _ in range(1 if quick else 4):
                answer = driver.ask("decode", batch=batch, context=CONTEXT, steps=24)
                total += answer["seconds"]
                reads += interleaved({"read": read}, 5)["read"].seconds
            read_bytes = read.nbytes / statistics.median(reads)
            floor = (_weight_bytes() + batch * CONTEXT * _kv_bytes()) / read_bytes
            yield compare(
                "decode step",
                f"{batch} sequences of {CONTEXT} tokens",
                constant(total),
                constant(floor),
                "weights and KV at read bandwidth",
            )


def _weight_bytes() -> int:
    """Of the decoder's layers and the head: what each step reads whole."""
    width, inner, heads, kv_heads, layers = SMALL.text
    kv_width = width // heads * kv_heads
    layer = 2 * width * width + 2 * width * kv_width + 3 * width * inner
    return BYTES * (layers * layer + SMALL.vocab_size * width)


def _kv_bytes() -> int:
    """Of the keys and values of one token, all layers."""
    width, _, heads, kv_heads, layers = SMALL.text
    return BYTES * 2 * layers * kv_heads * (width // heads)

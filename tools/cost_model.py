# SPDX-License-Identifier: Apache-2.0
"""What a load of pictures costs: prints the tables of docs/scaling.md, which a test compares.

``python tools/cost_model.py``
"""

import math
from dataclasses import dataclass

RATES = (10, 1_000, 100_000)
"""Pictures a second."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows of benchmarks/results.md, for a Xeon with AMX.

    Attributes:
        cores: of the machine that was measured.
        encode_seconds: vision tower of Granite Vision 3.x, a picture of 5 tiles.
        flops: bf16 products a second.
        read_bytes: bytes that are read a second.
        over_floor: a decode step of 16 over the time of its reads.
    """

    cores: int = 4
    encode_seconds: float = 0.699
    flops: float = 4.36e12
    read_bytes: float = 48.1e9
    over_floor: float = 1.48


@dataclass(frozen=True, slots=True)
class Model:
    """Granite Vision 3.3 2B in bf16, by its configuration, and a square picture of 5 tiles.

    Attributes:
        layers, width, feed_forward, kv_width, vocabulary: of the decoder.
        features: rows: 5 tiles of 729, and a newline behind each of 54 lines.
    """

    layers: int = 40
    width: int = 2048
    feed_forward: int = 8192
    kv_width: int = 512
    vocabulary: int = 49_155
    features: int = 5 * 729 + 54

    @property
    def weights(self) -> int:
        """Numbers in the decoder's layers."""
        attention = 2 * self.width**2 + 2 * self.width * self.kv_width
        return self.layers * (attention + 3 * self.width * self.feed_forward)

    @property
    def feature_bytes(self) -> int:
        return 2 * self.features * self.width


@dataclass(frozen=True, slots=True)
class Assumed:
    """What was not measured, or not with this load.

    Attributes:
        text: tokens of the prompt beside the picture.
        answer: tokens.
        batch: requests that decode together.
        picture_bytes: as JPEG.
        processing_seconds: of one core, to decode a JPEG and cut it; of another picture (1024 x
            768) on another machine (an AMD EPYC), and not in the results.
        utilization: of cores that wait for requests; above it queues grow long.
        host_cores: of a host.
        host_read_bytes: that all cores of a host read a second: two thirds of what two sockets
            with eight channels of DDR5-4800 have by their specification.
        store_bytes: that a file server reads or writes a second (25 Gbit/s).
        store_operations: on names and attributes of files, for one picture: make, rename, find,
            open, stamp and delete, some of them twice.
        wait_seconds: from a picture's encoding to its decoder's reading.
        proxy_chats: a second, of one proxy process.
    """

    text: int = 50
    answer: int = 100
    batch: int = 16
    picture_bytes: int = 600_000
    processing_seconds: float = 0.016
    utilization: float = 0.7
    host_cores: int = 64
    host_read_bytes: float = 400e9
    store_bytes: float = 3.1e9
    store_operations: int = 10
    wait_seconds: float = 10.0
    proxy_chats: int = 200


MEASURED, MODEL, ASSUMED = Measured(), Model(), Assumed()


def encode_core_seconds() -> float:
    """Of one picture."""
    return MEASURED.cores * MEASURED.encode_seconds


def prefill_core_seconds() -> float:
    """Of one prompt: the products of the layers at the bf16 ceiling, attention left out."""
    tokens = MODEL.features + ASSUMED.text
    return MEASURED.cores * 2 * MODEL.weights * tokens / MEASURED.flops


def core_read_bytes() -> float:
    """That a core reads a second when all of its host do: no more than its part of the memory's."""
    alone = MEASURED.read_bytes / MEASURED.cores
    return min(alone, ASSUMED.host_read_bytes / ASSUMED.host_cores)


def decode_core_seconds() -> float:
    """Of one answer, in a full batch: weights once a step, and the keys and values of each."""
    context = MODEL.features + ASSUMED.text + ASSUMED.answer / 2
    kv = 2 * 2 * MODEL.layers * MODEL.kv_width * context * ASSUMED.batch
    weights = 2 * (MODEL.weights + MODEL.vocabulary * MODEL.width)
    step = MEASURED.over_floor * (weights + kv) / core_read_bytes()
    return step * ASSUMED.answer / ASSUMED.batch


def proxy_bytes() -> float:
    """Of one picture through a proxy, as base64: from the client, to an encoder and a decoder."""
    return 3 * ASSUMED.picture_bytes * 4 / 3


def per_picture() -> list[tuple[str, str]]:
    """What one picture costs, in words and figures."""
    return [
        ("decode the JPEG and cut it into tiles", f"{ASSUMED.processing_seconds:.3f} core-seconds"),
        ("encode it", f"{encode_core_seconds():.1f} core-seconds"),
        ("move its features", f"{MODEL.feature_bytes / 1e6:.1f} MB written and read"),
        ("prefill its prompt on a CPU", f"{prefill_core_seconds():.1f} core-seconds"),
        ("decode its answer on a CPU", f"{decode_core_seconds():.1f} core-seconds"),
    ]


def per_rate(rate: int) -> list[tuple[str, str]]:
    """What a load needs."""

    def cores(seconds: float) -> int:
        return math.ceil(rate * seconds / ASSUMED.utilization)

    encoders = cores(encode_core_seconds())
    decoders = cores(prefill_core_seconds() + decode_core_seconds())
    moved = rate * MODEL.feature_bytes
    return [
        ("cores that encode", f"{encoders:,}"),
        ("hosts that encode", f"{math.ceil(encoders / ASSUMED.host_cores):,}"),
        ("cores that decode, if CPUs do", f"{decoders:,}"),
        ("cores of front ends", f"{cores(2 * ASSUMED.processing_seconds):,}"),
        ("features, GB/s each way", f"{moved / 1e9:,.2f}"),
        ("file servers for them", f"{math.ceil(2 * moved / ASSUMED.store_bytes):,}"),
        ("operations on their files a second", f"{rate * ASSUMED.store_operations:,}"),
        ("bytes that wait in their folders, GB", f"{moved * ASSUMED.wait_seconds / 1e9:,.1f}"),
        ("pictures through the proxies, GB/s", f"{rate * proxy_bytes() / 1e9:,.2f}"),
        ("proxies", f"{math.ceil(rate / ASSUMED.proxy_chats):,}"),
    ]


def tables() -> str:
    """Both tables, as the page has them."""
    lines = ["| of one picture | |", "| --- | --- |"]
    lines += [f"| {what} | {figure} |" for what, figure in per_picture()]
    lines += ["", "| pictures a second | " + " | ".join(f"{rate:,}" for rate in RATES) + " |"]
    lines += ["| --- |" + " --- |" * len(RATES)]
    for rows in zip(*map(per_rate, RATES), strict=True):
        lines.append(f"| {rows[0][0]} | " + " | ".join(figure for _, figure in rows) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())

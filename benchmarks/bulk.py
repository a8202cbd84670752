# SPDX-License-Identifier: Apache-2.0
"""``vllm-spyre-mm embed`` from files to shards, beside the encoder on what is processed already."""

import io
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks.measure import Figure, Row, Timing, compare, constant
from vllm_spyre_mm.cli.embed import AT_ONCE, encode_files
from vllm_spyre_mm.cli.encoder import VisionEncoder
from vllm_spyre_mm.cli.media import read_picture
from vllm_spyre_mm.cli.shards import Shards
from vllm_spyre_mm.demo import pictures
from vllm_spyre_mm.host_memory import return_free_memory
from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice

ROUNDS = 4
MOST, BUDGET = 1000, 600.0
"""Pictures, and the seconds that they may take: fewer are encoded where those do not suffice."""

BARE = 5
"""The bare encoder gets one picture of so many."""

SIDE = 384
"""Of a picture, in pixels: two tiles of Granite Vision 3.x's tower."""


def bulk_rows(checkpoint: Path, quick: bool) -> Iterator[Row]:
    """Up to 1,000 pictures (16 in the quick form) in four rounds, each beside the bare encoder."""
    encoder, choice = VisionEncoder(str(checkpoint)), EmbeddingChoice()
    taken: dict[str, list[float]] = {"files": [], "bare": []}
    resident = []
    with tempfile.TemporaryDirectory() as folder:
        files = _draw(Path(folder), MOST)
        items = [encoder.process(read_picture(file)) for file in files[:AT_ONCE]]
        encoder.encode(items, choice)
        per_round = 4 if quick else _per_round(lambda: encoder.encode(items, choice))
        shards = Shards(Path(folder) / "features.safetensors", per_round, {})
        batches = max(1, per_round // AT_ONCE // BARE)
        for number in range(ROUNDS):
            started = time.perf_counter()
            for _ in range(batches):
                encoder.encode(items, choice)
            bare = time.perf_counter()
            some = files[number * per_round : (number + 1) * per_round]
            with tqdm(disable=True) as progress:
                encode_files(encoder, choice, some, shards, [], progress)
            done = time.perf_counter()
            taken["bare"].append((bare - started) / (batches * AT_ONCE))
            taken["files"].append((done - bare) / per_round)
            return_free_memory()  # what glibc happens to keep differs by more than what is asked
            resident.append(float(psutil.Process().memory_info().rss))
    yield compare(
        "bulk",
        f"embed, a picture of {per_round * ROUNDS}",
        Timing(tuple(taken["files"])),
        Timing(tuple(taken["bare"])),
        "bare encoder",
        Figure.SHARE,
    )
    yield compare(
        "memory",
        f"embed after {per_round * ROUNDS} pictures (bytes)",
        constant(resident[-1]),
        constant(resident[ROUNDS // 2 - 1]),
        "after half of them",
    )


def _per_round(encode: Callable[[], object]) -> int:
    """Pictures of a round: what its part of the budget suffices for, at least two batches."""
    started = time.perf_counter()
    encode()
    each = (time.perf_counter() - started) / AT_ONCE
    fitting = int(BUDGET / ROUNDS / (each * (1 + 1 / BARE)))
    return max(2 * AT_ONCE, min(fitting, MOST // ROUNDS))


def _draw(folder: Path, number: int) -> list[Path]:
    """Pictures of coloured shapes as PNG; a few are drawn, and each is many files."""
    contents = []
    for seed in range(20):
        rng = random.Random(seed)
        drawn = pictures.draw_picture(pictures.random_shapes(rng, 4), (SIDE, SIDE), rng=rng)
        buffer = io.BytesIO()
        drawn.image.save(buffer, format="PNG")
        contents.append(buffer.getvalue())
    files = [folder / f"{index:05}.png" for index in range(number)]
    for index, file in enumerate(files):
        file.write_bytes(contents[index % len(contents)])
    return files

# SPDX-License-Identifier: Apache-2.0
"""``vllm-spyre-mm embed`` from files to shards, beside the encoder on what is processed already."""

import io
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks.measure import Row, Timing, compare, constant
from vllm_spyre_mm.cli.embed import AT_ONCE, encode_files
from vllm_spyre_mm.cli.shards import Shards
from vllm_spyre_mm.demo import pictures
from vllm_spyre_mm.encoder import VisionEncoder, read_picture
from vllm_spyre_mm.model_executor.memory import return_free_memory
from vllm_spyre_mm.multimodal.embedding import EmbeddingChoice

ROUNDS = 4
BARE = 5
"""The bare encoder gets one picture of so many."""

SIDE = 384
"""Of a picture, in pixels: two tiles of Granite Vision 3.x's tower."""


def bulk_rows(checkpoint: Path, quick: bool) -> Iterator[Row]:
    """1,000 pictures (16 in the quick form) in four rounds, each beside the bare encoder."""
    per_round = (16 if quick else 1000) // ROUNDS
    encoder, choice = VisionEncoder(str(checkpoint)), EmbeddingChoice()
    taken: dict[str, list[float]] = {"files": [], "bare": []}
    resident = []
    with tempfile.TemporaryDirectory() as folder:
        files = _draw(Path(folder), per_round * ROUNDS)
        items = [encoder.process(read_picture(file)) for file in files[:AT_ONCE]]
        encoder.encode(items, choice)
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
        at_most=1 / 0.95,
    )
    yield compare(
        "memory",
        f"embed after {per_round * ROUNDS} pictures (bytes)",
        constant(resident[-1]),
        constant(resident[ROUNDS // 2 - 1]),
        "after half of them",
        at_most=1.01,
    )


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

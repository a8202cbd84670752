# SPDX-License-Identifier: Apache-2.0
"""``vllm-spyre-mm embed``: features of many pictures and videos, with the vision encoder alone.

A run skips pictures that are in a shard already: after a kill only those of the unfinished shard
are encoded again, and nothing is lost or duplicated.
"""

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_spyre_mm.cli.shards import Shards, ShardWriteError

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from vllm_spyre_mm.cli.encoder import ProcessedItem, VisionEncoder
    from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice

SUMMARY = "write the features of pictures to safetensors or Parquet"

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes of the files that are taken from a folder."""

Batch = list[tuple[Path, "ProcessedItem"]]

AT_ONCE = 4
"""Pictures that are encoded together; the encoder processes few tiles at a time anyway."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IMAGE",
        help="a picture, a video if the model takes some, a folder of pictures, a .jsonl whose "
        "lines have an `images` list of paths, or "
        "- for paths on standard input, a line each",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="FILE.safetensors or FILE.parquet: shards FILE-00001.safetensors and so on are "
        "written beside it, and FILE.safetensors.index.json, which says where each picture is",
    )
    parser.add_argument("--model", help="folder or hub name (default: the embedded checkpoint)")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--pooling", choices=("raw", "image", "frame", "base"), default="raw")
    parser.add_argument(
        "--levels",
        choices=("input", "all"),
        default="all",
        help="of a model with deepstack: all columns, or the decoder's input alone (default: all)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="of what is written (default: the encoder's)",
    )
    parser.add_argument(
        "--encoder-dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="what the encoder computes in (default: the host's fastest)",
    )
    parser.add_argument(
        "--shard-size",
        type=_positive,
        default=1000,
        help="pictures in a shard (default: 1000), which closes at 1 GiB in any case",
    )
    parser.add_argument("--eager", action="store_true", help="do not compile the encoder")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a shard holds at least one picture, not {number}")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Encode pictures and write the shards.

    Returns:
        The exit status: 1 if some pictures could not be encoded, none were given or a shard could
        not be written, 2 if nothing was begun.
    """
    from tqdm import tqdm

    made_with = {
        "model": arguments.model or "the embedded checkpoint",
        "revision": arguments.revision or "",
        "pooling": arguments.pooling,
        "dtype": arguments.dtype,
    }
    if arguments.levels != "all":
        made_with["levels"] = arguments.levels
    if arguments.encoder_dtype != "auto":
        made_with["encoder_dtype"] = arguments.encoder_dtype
    try:
        shards = Shards(arguments.output, arguments.shard_size, made_with)
        paths = dict.fromkeys(find_pictures(arguments.inputs))
        missing = [path for path in paths if str(path) not in shards.index]
        encoder = _encoder(arguments) if missing else None
    except (ValueError, OSError, ImportError) as error:
        print(f"nothing was begun: {error}", file=sys.stderr)
        return 2
    if not paths:
        print("no pictures were given", file=sys.stderr)
        return 1
    failed: list[str] = []
    try:
        if encoder is not None:
            choice, done = _choice(arguments), len(paths) - len(missing)
            with tqdm(total=len(paths), initial=done, unit="image") as progress:
                encode_files(encoder, choice, missing, shards, failed, progress)
        shards.finish()
    except ShardWriteError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(shards.index)} pictures in {shards.index_file}")
    if failed:
        print(f"{len(failed)} could not be encoded:", *failed, sep="\n  ", file=sys.stderr)
    return int(bool(failed))


def find_pictures(inputs: Iterable[str]) -> Iterator[Path]:
    """The picture files that the command line names; those of a folder sorted by name."""
    for given in inputs:
        if given == "-":
            yield from (Path(line.strip()) for line in sys.stdin if line.strip())
            continue
        path = Path(given)
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        elif path.suffix == ".jsonl":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield from map(Path, _images_of(line, f"{path}, line {number}"))
        else:
            yield path


def encode_files(
    encoder: "VisionEncoder",
    choice: "EmbeddingChoice",
    paths: Iterable[Path],
    shards: Shards,
    failed: list[str],
    progress: "tqdm",
) -> None:
    """Encode files into shards, which the caller finishes.

    Args:
        encoder: of the model.
        choice: which rows, and their dtype.
        paths: of pictures.
        shards: get the features of each picture under its path.
        failed: gets a line for each file that cannot be read or encoded; nothing of it is written.
        progress: counts files.
    """
    for path, features in _features(encoder, choice, paths, failed, progress):
        shards.add(str(path), features)


def _images_of(line: bytes, where: str) -> list[str]:
    try:
        images = json.loads(line)["images"]
    except (ValueError, KeyError, TypeError, RecursionError):
        images = None
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"{where}: this is no JSON object with a list `images` of paths")
    return images


def _encoder(arguments: argparse.Namespace) -> "VisionEncoder":
    import torch

    from vllm_spyre_mm.cli.encoder import VisionEncoder
    from vllm_spyre_mm.demo import checkpoint_path

    dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    return VisionEncoder(
        arguments.model or str(checkpoint_path()),
        dtypes[arguments.encoder_dtype],
        backend="eager" if arguments.eager else "inductor",
        revision=arguments.revision,
    )


def _choice(arguments: argparse.Namespace) -> "EmbeddingChoice":
    from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice

    return EmbeddingChoice(
        pooling=arguments.pooling, levels=arguments.levels, dtype=arguments.dtype
    )


def _features(
    encoder: "VisionEncoder",
    choice: "EmbeddingChoice",
    paths: Iterable[Path],
    failed: list[str],
    progress: "tqdm",
) -> "Iterator[tuple[Path, torch.Tensor]]":
    """Features of each picture that can be encoded, in order; the next pictures are prefetched."""
    import torch

    def read(path: Path) -> "ProcessedItem":
        return encoder.process(encoder.read(path))

    batch: Batch = []
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as readers:
        remaining = iter(paths)
        ahead: deque[tuple[Path, Future[ProcessedItem]]] = deque()
        while True:
            while len(ahead) < 4 * AT_ONCE and (path := next(remaining, None)) is not None:
                ahead.append((path, readers.submit(read, path)))
            if ahead:
                path, future = ahead.popleft()
                try:
                    batch.append((path, future.result()))
                except Exception as error:  # libraries raise anything for damaged files
                    failed.append(_fault(path, error))
                    progress.update()
            if batch and (len(batch) == AT_ONCE or not ahead):
                yield from _encoded(encoder, choice, batch, failed)
                progress.update(len(batch))
                batch.clear()
            if not ahead and not batch:
                return


def _encoded(
    encoder: "VisionEncoder", choice: "EmbeddingChoice", batch: "Batch", failed: list[str]
) -> "Iterator[tuple[Path, torch.Tensor]]":
    """Features of a batch of pictures; if that fails, each picture is encoded alone."""
    try:
        encoded = encoder.encode([picture for _, picture in batch], choice)
    except Exception as error:  # anything may come out of a vision tower
        if len(batch) == 1:
            failed.append(_fault(batch[0][0], error))
            return
        for each in batch:
            yield from _encoded(encoder, choice, [each], failed)
    else:
        yield from zip((path for path, _ in batch), encoded, strict=True)


def _fault(path: Path, error: Exception) -> str:
    """A line about a picture; the traceback is in the log for those who look for it."""
    from vllm_spyre_mm.log import get_logger
    from vllm_spyre_mm.multimodal.feature_check import FeatureError

    get_logger(__name__).debug("%s could not be encoded", path, exc_info=error)
    if isinstance(error, FeatureError):
        return f"{path}: it was encoded to {error}"
    said = str(error) if isinstance(error, (OSError, ValueError)) else ""
    return f"{path}: {said or f'{type(error).__name__}: {error}'}"

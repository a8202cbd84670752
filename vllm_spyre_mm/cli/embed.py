# SPDX-License-Identifier: Apache-2.0
"""``vllm-spyre-mm embed``: features of many pictures, with the vision encoder alone.

A shard is written under another name and then renamed, so that what has a shard's name is whole.
The next run skips the pictures that shards hold: after a kill, those of the one shard under way are
encoded again, and nothing is lost or twice.
"""

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vllm_spyre_mm.encoder import VisionEncoder

SUMMARY = "write the features of pictures to safetensors"

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Files that are taken from a folder."""

AT_ONCE = 4
"""Pictures that are encoded together; the encoder takes few tiles at a time anyhow."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IMAGE",
        help="a picture, a folder of them, a .jsonl whose lines have an `images` list of paths, or "
        "- for paths on standard input, a line each",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="FILE.safetensors: shards FILE-00001.safetensors and so on are written beside it, and "
        "FILE.safetensors.index.json, which says where each picture is",
    )
    parser.add_argument("--model", help="folder or hub name (default: the embedded checkpoint)")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--pooling", choices=("raw", "image", "base"), default="raw")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto"
    )
    parser.add_argument(
        "--shard-size", type=int, default=1000, help="pictures in a shard (default: 1000)"
    )
    parser.add_argument("--eager", action="store_true", help="do not compile the encoder")


def run(arguments: argparse.Namespace) -> int:
    """Encode; the exit status is 1 if some pictures could not be read or none were given."""
    from tqdm import tqdm

    made_with = {
        "model": arguments.model or "the embedded checkpoint",
        "revision": arguments.revision or "",
        "pooling": arguments.pooling,
        "dtype": arguments.dtype,
    }
    shards = Shards(arguments.output, arguments.shard_size, made_with)
    paths = dict.fromkeys(find_pictures(arguments.inputs))
    if not paths:
        print("no pictures were given", file=sys.stderr)
        return 1
    missing = [path for path in paths if str(path) not in shards.index]
    failed: list[str] = []
    if missing:
        encoder = _encoder(arguments)
        choice = _choice(arguments)
        with tqdm(total=len(paths), initial=len(paths) - len(missing), unit="image") as progress:
            for path, features in _features(encoder, choice, missing, failed, progress):
                shards.add(str(path), features)
    shards.finish()
    print(f"{len(shards.index)} pictures in {shards.index_file}")
    if failed:
        print(f"{len(failed)} could not be read:", *failed, sep="\n  ", file=sys.stderr)
    return int(bool(failed))


def find_pictures(inputs: Iterable[str]) -> Iterator[Path]:
    """The files that the command line names, folders in the order of their names."""
    for given in inputs:
        if given == "-":
            yield from (Path(line.strip()) for line in sys.stdin if line.strip())
            continue
        path = Path(given)
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        elif path.suffix == ".jsonl":
            with path.open() as lines:
                for line in filter(str.strip, lines):
                    yield from map(Path, json.loads(line)["images"])
        else:
            yield path


class Shards:
    """Safetensors files with an index, in the layout of a sharded checkpoint.

    Args:
        output: ``FILE.safetensors``.
        size: pictures in a shard.
        made_with: what the features depend on; kept in every shard.

    Raises:
        ValueError: shards are there that were made with something else.
    """

    def __init__(self, output: Path, size: int, made_with: dict[str, str]) -> None:
        from safetensors import safe_open

        self.output = (
            output if output.suffix == ".safetensors" else output.with_suffix(".safetensors")
        )
        self.size, self.made_with = size, made_with
        self.index: dict[str, str] = {}
        self._waiting: dict[str, torch.Tensor] = {}
        files = sorted(self.output.parent.glob(f"{self.output.stem}-[0-9]*.safetensors"))
        for file in files:
            with safe_open(file, framework="pt") as shard:
                if shard.metadata() != made_with:
                    raise ValueError(
                        f"{file} was made with {shard.metadata()}, not {made_with}: choose another "
                        "output or delete it"
                    )
                self.index |= dict.fromkeys(shard.keys(), file.name)
        self._number = len(files)

    @property
    def index_file(self) -> Path:
        """Says in which shard each picture is."""
        return self.output.with_name(f"{self.output.name}.index.json")

    def add(self, name: str, features: "torch.Tensor") -> None:
        """Take one picture's features, ``(rows, hidden_size)``."""
        self._waiting[name] = features
        if len(self._waiting) >= self.size:
            self._write()

    def finish(self) -> None:
        """Write what is left, and the index."""
        if self._waiting:
            self._write()
        index = {"metadata": self.made_with, "weight_map": self.index}
        _replace(self.index_file, lambda file: file.write_text(json.dumps(index, indent=1)))

    def _write(self) -> None:
        from safetensors.torch import save_file

        self._number += 1
        file = self.output.with_name(f"{self.output.stem}-{self._number:05}.safetensors")
        tensors, self._waiting = self._waiting, {}
        _replace(file, lambda unfinished: save_file(tensors, unfinished, self.made_with))
        self.index |= dict.fromkeys(tensors, file.name)


def _replace(file: Path, write: Any) -> None:
    """Write a file under another name and rename it, so that it is whole or not there."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        write(unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _encoder(arguments: argparse.Namespace) -> "VisionEncoder":
    from vllm_spyre_mm.demo import checkpoint_path
    from vllm_spyre_mm.encoder import VisionEncoder

    return VisionEncoder(
        arguments.model or str(checkpoint_path()),
        backend="eager" if arguments.eager else "inductor",
        revision=arguments.revision,
    )


def _choice(arguments: argparse.Namespace) -> Any:
    from vllm_spyre_mm.multimodal.embedding import EmbeddingChoice

    return EmbeddingChoice(pooling=arguments.pooling, dtype=arguments.dtype)


def _features(
    encoder: "VisionEncoder", choice: Any, paths: list[Path], failed: list[str], progress: Any
) -> "Iterator[tuple[Path, torch.Tensor]]":
    """Features of each picture that can be read, in order; the next are read meanwhile."""
    from vllm_spyre_mm.encoder import read_picture

    def read(path: Path) -> Any:
        return encoder.process(read_picture(path))

    batch: list[tuple[Path, Any]] = []
    with ThreadPoolExecutor(max_workers=2) as readers:
        remaining = iter(paths)
        ahead: deque[tuple[Path, Future[Any]]] = deque()
        while True:
            while len(ahead) < 4 * AT_ONCE and (path := next(remaining, None)) is not None:
                ahead.append((path, readers.submit(read, path)))
            if ahead:
                path, future = ahead.popleft()
                try:
                    batch.append((path, future.result()))
                except (OSError, ValueError) as error:
                    failed.append(f"{path}: {error}")
                    progress.update()
            if batch and (len(batch) == AT_ONCE or not ahead):
                encoded = encoder.encode([item for _, item in batch], choice)
                yield from zip((path for path, _ in batch), encoded, strict=True)
                progress.update(len(batch))
                batch.clear()
            if not ahead and not batch:
                return

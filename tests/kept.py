# SPDX-License-Identifier: Apache-2.0
"""Results that take long to compute, kept in a folder by a hash of what they were computed from."""

import hashlib
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

FOLDER = Path(__file__).parents[1] / ".reference_cache"
"""Ignored by git; ``make clean`` removes it."""

DISTRIBUTIONS = ("transformers", "tokenizers", "torch", "torchvision", "pillow")


def digest(*parts: bytes | str) -> str:
    """A hash of parts; their boundaries count."""
    found = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        found.update(f"{len(content)}:".encode() + content)
    return found.hexdigest()


def digest_of_files(folder: Path) -> str:
    """A hash of the names and contents of a folder's files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return digest(*(part for file in files for part in (file.name, file.read_bytes())))


def digest_of_software() -> str:
    """A hash of what computes a reference: versions, and the instructions that the CPU offers."""
    versions = [importlib.metadata.version(name) for name in DISTRIBUTIONS]
    return digest(*versions, torch.backends.cpu.get_cpu_capability())


def digest_of_images(images: Iterable[Image.Image]) -> str:
    """A hash of modes, sizes and pixels."""
    return digest(
        *(
            part
            for image in images
            for part in (
                image.tobytes(),
                repr((image.mode, image.size, image.getpalette(), image.info.get("transparency"))),
            )
        )
    )


class Kept:
    """Values, tensors or lists of numbers, in files.

    Args:
        folder: of the files; it is made if it does not exist.
        made_of: hashed into every key.
    """

    def __init__(self, folder: Path, *made_of: str) -> None:
        self.folder, self.made_of = folder, made_of

    def get(self, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        """The value that was kept for a key, or else a new one, which is kept."""
        file = self.folder / f"{digest(*self.made_of, *key)}.pt"
        if file.exists():
            return torch.load(file, weights_only=True)
        value = make()
        self.folder.mkdir(exist_ok=True)
        # Written under another name first: other processes look for the file.
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as written:
            torch.save(value, written)
        os.replace(written.name, file)
        return value

# SPDX-License-Identifier: Apache-2.0
"""Image features in files of a folder, which outlive the process and which engines may share.

A file is written beside its place and moved there, carries a checksum, and names the features'
origin: what is damaged, cut short or another encoder's is never given out. The folder is bounded in
bytes; of its files the one that was used longest ago goes first.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from vllm_spyre_mm.log import get_logger

logger = get_logger(__name__)

SUFFIX, UNFINISHED = ".features", ".unfinished"

ABANDONED_SECONDS = 3600
"""Age at which an unfinished file belongs to a process that has ended."""

MAX_KNOWN = 4096
"""Files that a store remembers to have checked."""

Identity = tuple[int, int, int]


class FeatureStore:
    """Features by the picture's identifier, in one folder.

    Args:
        folder: made if it is not there; may hold other files, which are left alone.
        origin: of the features: engines with another one find nothing of each other's.
        max_bytes: bound on the files of all engines that share the folder.
    """

    def __init__(self, folder: Path, origin: str, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.origin, self.max_bytes = folder, origin, max_bytes
        self._checked: OrderedDict[Path, Identity] = OrderedDict()

    def path(self, identifier: str) -> Path:
        """The file of a picture; the identifier may be any text."""
        name = hashlib.sha256(json.dumps([self.origin, identifier]).encode()).hexdigest()
        return self.folder / f"{name}{SUFFIX}"

    def holds(self, identifier: str) -> bool:
        """Whether there are whole features of a picture; what is damaged is deleted."""
        path = self.path(identifier)
        identity = _identity(path)
        if identity is None:
            return False
        if self._checked.get(path) != identity and self.read(identifier) is None:
            return False
        self._checked[path] = identity
        self._checked.move_to_end(path)
        while len(self._checked) > MAX_KNOWN:
            self._checked.popitem(last=False)
        return True

    def read(self, identifier: str) -> torch.Tensor | None:
        """The features of a picture, ``(num_features, width)`` in memory of their own.

        Returns:
            None if there are none, or no whole ones: a damaged file is deleted.
        """
        path = self.path(identifier)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        rows = _parsed(content, self.origin, identifier)
        if rows is None:
            logger.warning("the features in %s are damaged: they are encoded anew", path)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(FileNotFoundError):  # another engine's turn to delete it
            used = time.time_ns()
            os.utime(path, ns=(used, path.stat().st_mtime_ns))
        return rows

    def write(self, identifier: str, rows: torch.Tensor) -> None:
        """Keep the features of a picture, and delete what goes beyond the bound.

        Args:
            identifier: of the picture.
            rows: ``(num_features, width)``.

        Raises:
            OSError: the folder cannot be written.
        """
        content = _composed(rows, self.origin, identifier)
        if len(content) > self.max_bytes:
            return
        handle, name = tempfile.mkstemp(suffix=UNFINISHED, dir=self.folder)
        unfinished = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            unfinished.replace(self.path(identifier))
        finally:
            unfinished.unlink(missing_ok=True)
        self._make_room()

    def _make_room(self) -> None:
        """Delete the files that were used longest ago, down to the bound."""
        now, total = time.time(), 0
        files: list[tuple[int, int, str]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if entry.name.endswith(SUFFIX):
                        files.append((status.st_atime_ns, status.st_size, entry.path))
                        total += status.st_size
                    elif entry.name.endswith(UNFINISHED) and _is_abandoned(status, now):
                        Path(entry.path).unlink(missing_ok=True)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


def _is_abandoned(status: os.stat_result, now: float) -> bool:
    return now - status.st_mtime > ABANDONED_SECONDS


def _identity(path: Path) -> Identity | None:
    """What changes when a file is written again; None if it is not there."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _composed(rows: torch.Tensor, origin: str, identifier: str) -> bytes:
    """The content of a file: a checksum, and safetensors with the features' names."""
    names = {"origin": origin, "identifier": identifier}
    content = save({"features": rows.contiguous()}, metadata=names)
    return hashlib.sha256(content).digest() + content


def _parsed(content: bytes, origin: str, identifier: str) -> torch.Tensor | None:
    """The features in the content of a file; None unless they are whole, and these."""
    size = hashlib.sha256().digest_size
    checksum, stored = content[:size], content[size:]
    if hashlib.sha256(stored).digest() != checksum:
        return None
    try:
        header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
        if header["__metadata__"] != {"origin": origin, "identifier": identifier}:
            return None
        return load(stored)["features"]
    except (SafetensorError, ValueError, KeyError):
        return None

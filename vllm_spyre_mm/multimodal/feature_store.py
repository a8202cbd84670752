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
import time
import uuid
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

RESCAN_WRITES = 16
"""Files that a store writes before it looks again at what others have written."""

SPARE_PART = 16
"""A full folder is emptied by one part of so many, so that not every file written has it listed."""

Identity = tuple[int, int, int]


class TooLargeError(OSError):
    """Features are larger than all files of the folder may be together."""


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
        self._told: set[tuple[type[OSError], int | None]] = set()
        self._total, self._num_unseen = 0, RESCAN_WRITES  # the first write looks at the folder

    def path(self, identifier: str) -> Path:
        """The file of a picture; the identifier may be any text."""
        name = hashlib.sha256(json.dumps([self.origin, identifier]).encode()).hexdigest()
        return self.folder / f"{name}{SUFFIX}"

    def holds(self, identifier: str) -> bool:
        """Whether there are whole features of a picture, which are used now.

        What is damaged is deleted; what cannot be read is taken as not there.
        """
        path = self.path(identifier)
        try:
            identity = _identity(path.stat())
        except OSError as error:
            self._tell_unreadable(error)
            return False
        if self._checked.get(path) == identity:
            _touch(path)
        elif self.read(identifier) is None:
            return False
        self._remember(path, identity)
        return True

    def read(self, identifier: str) -> torch.Tensor | None:
        """The features of a picture, ``(num_features, width)`` in memory of their own.

        Returns:
            None if there are none, they cannot be read, or are not whole: a damaged file is
            deleted.
        """
        path = self.path(identifier)
        try:
            content = path.read_bytes()
        except OSError as error:
            self._tell_unreadable(error)
            return None
        rows = _parsed(content, self.origin, identifier)
        if rows is None:
            logger.warning("the features in %s are damaged: they are encoded anew", path)
            _delete(path)
            return None
        _touch(path)
        return rows

    def write(self, identifier: str, rows: torch.Tensor) -> None:
        """Keep the features of a picture, and delete what goes beyond the bound.

        Args:
            identifier: of the picture.
            rows: ``(num_features, width)``.

        Raises:
            TooLargeError: they are larger than the bound.
            OSError: the folder cannot be written.
        """
        content = _composed(rows, self.origin, identifier)
        if len(content) > self.max_bytes:
            raise TooLargeError(
                f"the features of a picture take {len(content)} bytes, and the folder may take "
                f"max_bytes={self.max_bytes}"
            )
        path, unfinished = self.path(identifier), self.folder / f"{uuid.uuid4().hex}{UNFINISHED}"
        try:
            with unfinished.open("xb") as file:
                file.write(content)
                file.flush()
                identity = _identity(os.fstat(file.fileno()))
            unfinished.replace(path)
        finally:
            _delete(unfinished)
        self._remember(path, identity)
        self._total += len(content)
        self._num_unseen += 1
        if self._total > self.max_bytes or self._num_unseen > RESCAN_WRITES:
            self._make_room(path)

    def is_news(self, error: OSError) -> bool:
        """Whether an error is the first of its kind, which the log is told."""
        kind = type(error), error.errno
        if kind in self._told:
            return False
        self._told.add(kind)
        return True

    def _tell_unreadable(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError) and self.is_news(error):
            logger.warning("features in the folder cannot be read: %s", error)

    def _remember(self, path: Path, identity: Identity) -> None:
        self._checked[path] = identity
        self._checked.move_to_end(path)
        while len(self._checked) > MAX_KNOWN:
            self._checked.popitem(last=False)

    def _make_room(self, written: Path) -> None:
        """Look at all files, and in a full folder delete those that were used longest ago.

        Args:
            written: the file that room is made for.
        """
        files = self._files()
        total = sum(size for _, size, _ in files)
        if total > self.max_bytes:
            bound = self.max_bytes - self.max_bytes // SPARE_PART
            for _, size, path in sorted(files):
                if total > bound and path != written and _delete(path):
                    total -= size
        self._total, self._num_unseen = total, 0

    def _files(self) -> list[tuple[int, int, Path]]:
        """When each file was used, its size and path; what a dead process left is deleted."""
        now = time.time()
        files: list[tuple[int, int, Path]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # another engine has deleted it
                    status, path = entry.stat(), Path(entry.path)
                    if path.suffix == SUFFIX:
                        files.append((status.st_atime_ns, status.st_size, path))
                    elif path.suffix == UNFINISHED and _is_abandoned(status, now):
                        _delete(path)
        return files


def _touch(path: Path) -> None:
    """Note that a file is used now, where its owner and the folder allow it."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _delete(path: Path) -> bool:
    """Delete a file, if it is there and the folder allows it; says whether it has gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _is_abandoned(status: os.stat_result, now: float) -> bool:
    return now - status.st_mtime > ABANDONED_SECONDS


def _identity(status: os.stat_result) -> Identity:
    """What changes when a file is written again."""
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

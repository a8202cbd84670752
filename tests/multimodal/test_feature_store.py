# SPDX-License-Identifier: Apache-2.0
"""Features in a folder: whole ones are found again, and nothing else is."""

import errno
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_spyre_mm.multimodal.feature_store import (
    ABANDONED_SECONDS,
    RESCAN_WRITES,
    UNFINISHED,
    FeatureStore,
    TooLargeError,
)

ROWS = torch.arange(12, dtype=torch.bfloat16).reshape(4, 3)
LARGE = 1 << 20


def found(store: FeatureStore, identifier: str) -> torch.Tensor:
    assert store.holds(identifier)
    rows = store.read(identifier)
    assert rows is not None
    return rows


@pytest.mark.parametrize("identifier", ["a1b2", "../../etc/passwd", "a/b\0c", "", "é" * 999])
def test_what_was_kept_is_found_by_a_later_store(tmp_path: Path, identifier: str) -> None:
    folder = tmp_path / "made" / "here"
    FeatureStore(folder, "origin", LARGE).write(identifier, ROWS)
    rows = found(FeatureStore(folder, "origin", LARGE), identifier)
    assert rows.dtype == ROWS.dtype
    assert torch.equal(rows, ROWS)
    assert [each.parent for each in tmp_path.rglob("*") if each.is_file()] == [folder]


def test_features_of_another_origin_are_not_found(tmp_path: Path) -> None:
    mine, others = (FeatureStore(tmp_path, origin, LARGE) for origin in ("mine", "theirs"))
    others.write("a", ROWS)
    assert not mine.holds("a")
    assert mine.read("a") is None
    mine.path("a").write_bytes(others.path("a").read_bytes())  # under the name of mine
    assert not mine.holds("a")
    assert torch.equal(found(others, "a"), ROWS)


def cut(content: bytes) -> bytes:
    return content[:-1]


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": cut,
    "flipped": flipped,
    "empty": lambda _: b"",
    "foreign": lambda _: b"something else" * 9,
    "longer": lambda content: content + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("looked_at", [False, True])
def test_what_is_damaged_is_not_given_out_and_kept_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes], looked_at: bool
) -> None:
    store = FeatureStore(tmp_path, "origin", LARGE)
    store.write("a", ROWS)
    if looked_at:
        assert store.holds("a")
    path = store.path("a")
    path.write_bytes(damage(path.read_bytes()))
    assert store.read("a") is None
    assert not store.holds("a")
    assert not path.exists()
    store.write("a", ROWS)
    assert torch.equal(found(store, "a"), ROWS)


def size_of_one(tmp_path: Path) -> int:
    store = FeatureStore(tmp_path / "measured", "origin", LARGE)
    store.write("a", ROWS)
    return store.path("a").stat().st_size


@pytest.mark.parametrize("use", [found, FeatureStore.holds, FeatureStore.read])
def test_the_files_that_were_used_longest_ago_go_first(
    tmp_path: Path, use: Callable[[FeatureStore, str], Any]
) -> None:
    """A full folder is emptied by a sixteenth; what is only looked up counts as used."""
    size = size_of_one(tmp_path)
    store = FeatureStore(tmp_path / "store", "origin", 16 * size)
    other = tmp_path / "store" / "notes.txt"
    other.write_text("not of the store" * size)
    names = "abcdefghijklmnop"
    for name in names:
        store.write(name, ROWS)
        time.sleep(0.002)
    use(store, "a")
    time.sleep(0.002)
    store.write("q", ROWS)
    assert [name for name in names + "q" if store.holds(name)] == ["a", *"defghijklmnopq"]
    assert other.exists()


def test_the_folder_is_listed_when_it_is_full_and_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, listed = size_of_one(tmp_path), []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scan(path))
    store = FeatureStore(tmp_path / "store", "origin", 32 * size)
    numbers = itertools.count()

    def written(count: int) -> int:
        """Write more files of one size; says how often the folder was listed until now."""
        for _ in range(count):
            store.write(chr(65 + next(numbers)), ROWS)
        return len(listed)

    assert written(1) == written(RESCAN_WRITES) == 1
    assert written(1) == written(14) == 2
    assert written(1) == 3
    assert len(list((tmp_path / "store").iterdir())) == 30


def test_a_file_that_fills_the_folder_is_kept(tmp_path: Path) -> None:
    size = size_of_one(tmp_path)
    store = FeatureStore(tmp_path / "store", "origin", size)
    for name in "ab":
        store.write(name, ROWS)
    assert [name for name in "ab" if store.holds(name)] == ["b"]


def test_features_beyond_the_bound_are_refused(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "origin", 20)
    with pytest.raises(
        TooLargeError, match=r"take \d+ bytes, and the folder may take max_bytes=20"
    ):
        store.write("a", ROWS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_umask_says_who_reads_a_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        store = FeatureStore(tmp_path, "origin", LARGE)
        store.write("a", ROWS)
    finally:
        os.umask(before)
    assert store.path("a").stat().st_mode & 0o777 == mode


def refuse(number: int) -> Callable[..., Any]:
    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("call", ["stat", "read_bytes"])
def test_what_cannot_be_read_is_not_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    number: int,
) -> None:
    FeatureStore(tmp_path, "origin", LARGE).write("a", ROWS)
    later = FeatureStore(tmp_path, "origin", LARGE)
    with monkeypatch.context() as patch:
        patch.setattr(Path, call, refuse(number))
        for _ in range(3):
            assert not later.holds("a")
    assert caplog.text.count("features in the folder cannot be read") == 1
    assert torch.equal(found(later, "a"), ROWS)


def test_a_folder_that_takes_nothing_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a read-only mount: neither times nor names can be changed there."""
    FeatureStore(tmp_path, "origin", LARGE).write("a", ROWS)
    store = FeatureStore(tmp_path, "origin", LARGE)
    monkeypatch.setattr(os, "utime", refuse(errno.EROFS))
    monkeypatch.setattr(Path, "unlink", refuse(errno.EROFS))
    for _ in range(2):
        assert torch.equal(found(store, "a"), ROWS)
    store.path("a").write_bytes(b"damaged")
    for _ in range(2):
        assert store.read("a") is None
        assert not store.holds("a")


def test_files_that_cannot_be_deleted_do_not_keep_others_from_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore(tmp_path / "store", "origin", 2 * size_of_one(tmp_path))
    monkeypatch.setattr(Path, "unlink", refuse(errno.EPERM))
    for name in "abc":
        store.write(name, ROWS)
    assert all(map(store.holds, "abc"))


def test_what_was_written_here_is_not_read_to_look_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore(tmp_path, "origin", LARGE)
    store.write("a", ROWS)
    monkeypatch.setattr(Path, "read_bytes", refuse(errno.EIO))
    assert store.holds("a")


def test_what_a_dead_process_left_unfinished_is_deleted_in_time(tmp_path: Path) -> None:
    old, new = (tmp_path / f"{name}{UNFINISHED}" for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    past = time.time() - ABANDONED_SECONDS - 1
    os.utime(old, (past, past))
    FeatureStore(tmp_path, "origin", LARGE).write("a", ROWS)
    assert not old.exists()
    assert new.exists()


def _write_and_read(shared: Path, bound: int, seed: int) -> None:
    store = FeatureStore(shared, "origin", bound)
    for step in range(400):
        name = str((step * seed) % 11)
        store.write(name, ROWS + int(name))
        other = str((step * 5) % 11)
        rows = store.read(other) if store.holds(other) else None
        assert rows is None or torch.equal(rows, ROWS + int(other))


def test_two_engines_share_a_folder_within_its_bound(tmp_path: Path) -> None:
    """Processes of their own write and read the same pictures, far more than there is room for."""
    size = size_of_one(tmp_path)
    shared, context = tmp_path / "shared", multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_write_and_read, args=(shared, 5 * size, seed)) for seed in (3, 7)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    FeatureStore(shared, "origin", 5 * size).write("last", ROWS)
    names = [each.name for each in shared.iterdir()]
    assert 1 < len(names) <= 5
    assert not any(name.endswith(UNFINISHED) for name in names)

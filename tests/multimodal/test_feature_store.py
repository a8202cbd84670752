# SPDX-License-Identifier: Apache-2.0
"""Features in a folder: whole ones are found again, and nothing else is."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm_spyre_mm.multimodal.feature_store import ABANDONED_SECONDS, UNFINISHED, FeatureStore

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


def test_the_file_that_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    size = size_of_one(tmp_path)
    store = FeatureStore(tmp_path / "store", "origin", 3 * size)
    other = tmp_path / "store" / "notes.txt"
    other.write_text("not of the store" * size)
    for name in "abc":
        store.write(name, ROWS)
        time.sleep(0.01)
    found(store, "a")
    time.sleep(0.01)
    store.write("d", ROWS)
    assert [name for name in "abcd" if store.holds(name)] == ["a", "c", "d"]
    assert other.exists()


def test_features_beyond_the_bound_are_not_kept(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "origin", 20)
    store.write("a", ROWS)
    assert not list(tmp_path.iterdir())


def test_what_a_dead_process_left_unfinished_is_deleted_in_time(tmp_path: Path) -> None:
    old, new = (tmp_path / f"{name}{UNFINISHED}" for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    past = time.time() - ABANDONED_SECONDS - 1
    os.utime(old, (past, past))
    FeatureStore(tmp_path, "origin", LARGE).write("a", ROWS)
    assert not old.exists()
    assert new.exists()


def test_two_engines_share_a_folder_within_its_bound(tmp_path: Path) -> None:
    """Both write and read the same pictures, far more than there is room for."""
    bound = 5 * size_of_one(tmp_path)
    shared = tmp_path / "shared"
    faults: list[object] = []

    def work(seed: int) -> None:
        store = FeatureStore(shared, "origin", bound)
        for step in range(150):
            name = str((step * seed) % 11)
            store.write(name, ROWS + int(name))
            rows = store.read(name)
            if rows is not None and not torch.equal(rows, ROWS + int(name)):
                faults.append(rows)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (3, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert sum(each.stat().st_size for each in shared.iterdir()) <= bound

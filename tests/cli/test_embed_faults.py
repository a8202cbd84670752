# SPDX-License-Identifier: Apache-2.0
"""Pictures, disks and formats that are not what they should be."""

import importlib.util
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.embedding_runs import Tower, read, run, shards_of
from tests.multimodal.mm_mappings.suite import assert_close
from vllm_spyre_mm.cli.encoder import VisionEncoder
from vllm_spyre_mm.demo import pictures


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def damaged(features: torch.Tensor) -> torch.Tensor:
        features = features.clone()
        features[3, 5] = value
        return features

    return damaged


def refuse(_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("this picture is not to my taste")


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (with_value(torch.nan), "it was encoded to features with NaN or infinity in bfloat16"),
        (with_value(-torch.inf), "it was encoded to features with NaN or infinity in bfloat16"),
        (lambda features: features[1:], "it was encoded to features of shape"),
        (refuse, "RuntimeError: this picture is not to my taste"),
    ],
    ids=["NaN", "infinity", "too few", "raises"],
)
def test_a_picture_that_cannot_be_encoded_is_listed_and_encoded_by_the_next_run(
    folder: Path,
    tmp_path: Path,
    tower: Tower,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[torch.Tensor], torch.Tensor],
    sentence: str,
) -> None:
    """Those that were to be encoded together with it are written."""
    (folder / "broken.png").unlink()
    third = folder / "2.png"
    pictures.Image.new("RGB", (60, 300), "red").save(third)
    output = tmp_path / "features.safetensors"
    more = ("--encoder-dtype", "bfloat16", "--pooling", "image")
    assert run(third, tmp_path / "alone.safetensors", *more) == 0
    (of_third,) = tower.counts  # no other picture has as many features
    tower.change = lambda features: [
        fault(each) if len(each) == of_third else each for each in features
    ]
    capsys.readouterr()
    assert run(folder, output, *more) == 1
    printed = capsys.readouterr()
    assert f"1 could not be encoded:\n  {third}: {sentence}" in printed.err
    assert "6 pictures in" in printed.out
    written = read(output)
    assert set(written) == {str(folder / f"{i}.png") for i in (0, 1, 3, 4, 5, 6)}
    assert all(rows.isfinite().all() for rows in written.values())
    tower.change = list
    assert run(folder, output, *more) == 0
    assert set(read(output)) == {str(folder / f"{i}.png") for i in range(7)}


def test_a_dtype_that_overflows_is_refused_with_one_that_fits(
    folder: Path, tmp_path: Path, tower: Tower, capsys: pytest.CaptureFixture[str]
) -> None:
    tower.change = lambda features: [each + 100_000 for each in features]
    picture, output = folder / "0.png", tmp_path / "features.safetensors"
    assert run(picture, output, "--dtype", "float16") == 1
    said = capsys.readouterr().err.rstrip()
    assert f"{picture}: the embedding has values up to 99840" in said
    assert said.endswith("which float16 cannot hold (65504 at most): choose dtype 'bfloat16'")
    assert not shards_of(output)
    output = tmp_path / "again.safetensors"
    assert run(picture, output, "--dtype", "bfloat16") == 0
    assert all(rows.isfinite().all() for rows in read(output).values())


def test_whatever_reading_a_picture_raises_is_a_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = VisionEncoder.process

    def process(self: Any, picture: pictures.Image.Image) -> Any:
        if picture.width == 13:
            raise ZeroDivisionError("in a library")
        return original(self, picture)

    monkeypatch.setattr(VisionEncoder, "process", process)
    pictures.Image.new("RGB", (13, 60), "red").save(folder / "broken.png")
    assert run(folder, tmp_path / "features.safetensors", "--pooling", "image") == 1
    said = capsys.readouterr().err
    assert f"1 could not be encoded:\n  {folder / 'broken.png'}: ZeroDivisionError: in a" in said


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Bounds the size of the files that this process writes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(
    folder: Path,
    output: Path,
    small_disk: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "broken.png").unlink()
    assert run(folder, output, "--dtype", "float32") == 0
    whole, (first, *others) = read(output), shards_of(output)
    sizes = [file.stat().st_size for file in (first, *others)]
    for file in others:
        file.unlink()
    small_disk(min(sizes) // 2)
    assert run(folder, output, "--dtype", "float32") == 1
    sentence = capsys.readouterr().err
    assert f"{others[0]} cannot be written: " in sentence
    assert "File too large" in sentence
    assert shards_of(output) == [first]
    assert not list(output.parent.glob(".*unfinished"))
    small_disk(resource.RLIM_INFINITY)
    assert run(folder, output, "--dtype", "float32") == 0
    again = read(output)
    assert again.keys() == whole.keys()
    for name, features in again.items():  # encoded beside other pictures than before
        assert_close(features, whole[name], 2e-2)


@pytest.mark.parametrize(
    ("output", "named"),
    [("features.csv", "not .csv"), ("features.parquet", "needs pyarrow")],
)
def test_a_format_that_there_is_not(
    tmp_path: Path,
    output: str,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path, tmp_path / output) == 2
    assert named in capsys.readouterr().err


def test_no_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, tmp_path / "features.safetensors") == 1
    assert "no pictures were given" in capsys.readouterr().err

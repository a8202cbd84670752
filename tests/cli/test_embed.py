# SPDX-License-Identifier: Apache-2.0
"""Features in bulk: real files, the embedded checkpoint, real shards."""

import importlib.util
import json
import random
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.multimodal.mm_mappings.suite import assert_close
from tests.reference import Reference
from vllm_spyre_mm.cli import embed, main, shards
from vllm_spyre_mm.cli.encoder import VisionEncoder
from vllm_spyre_mm.demo import pictures

QUESTION = "<|user|>\n<image>\nWhat?\n<|assistant|>\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = random.Random("embed")
    for i in range(7):
        size = (rng.randint(30, 260), rng.randint(30, 260))
        picture = pictures.draw_picture(pictures.random_shapes(rng, 2), size, rng=rng)
        picture.image.save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(params=["safetensors", "parquet"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"features.{request.param}"


def run(folder: Path, output: Path, *more: str) -> int:
    return main(["embed", str(folder), "-o", str(output), "--eager", "--shard-size", "3", *more])


def shards_of(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"features-0*{output.suffix}"))


def read_shard(file: Path) -> dict[str, torch.Tensor]:
    """All of a shard, as its users open it."""
    if file.suffix == ".safetensors":
        return load_file(file)
    cache = str(file.parent / "cache")
    table = Dataset.from_parquet(str(file), cache_dir=cache).with_format("torch")
    return {row["path"]: row["features"] for row in table}


def read(output: Path) -> dict[str, torch.Tensor]:
    """Everything that the index names, from where it says."""
    index = json.loads(Path(f"{output}.index.json").read_text())
    shards = {name: read_shard(output.with_name(name)) for name in index["weight_map"].values()}
    return {name: shards[file][name] for name, file in index["weight_map"].items()}


def test_features_of_a_folder(
    folder: Path, output: Path, demo_reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, output) == 1  # one could not be read
    printed = capsys.readouterr()
    assert f"7 pictures in {output}.index.json" in printed.out
    assert "1 could not be encoded:" in printed.err
    assert f"{folder / 'broken.png'}: Failed to load image" in printed.err
    found = read(output)
    assert set(found) == {str(folder / f"{i}.png") for i in range(7)}
    assert len(shards_of(output)) == 3
    for name, features in found.items():
        image = pictures.Image.open(name).convert("RGB")
        assert_close(features, demo_reference.features(QUESTION, [image]), 2e-2)


def test_what_is_there_is_not_encoded_again(
    folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    original = VisionEncoder.encode

    def counting(self: Any, items: Any, choice: Any) -> Any:
        if sum(encoded) >= 4 and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        encoded.append(len(items))
        return original(self, items, choice)

    killed: list[bool] = []
    monkeypatch.setattr(VisionEncoder, "encode", counting)
    with pytest.raises(KeyboardInterrupt):
        run(folder, output)
    assert len(shards_of(output)) == 1
    run(folder, output)
    assert sum(encoded) == 4 + 4  # of the four before the kill, one was in no shard yet
    names = [name for file in shards_of(output) for name in read_shard(file)]
    assert len(names) == len(set(names)) == 7
    assert not list(output.parent.glob(".*unfinished"))


Features = list[torch.Tensor]


class Tower:
    """Stands between the model and what is done with its features."""

    def __init__(self) -> None:
        self.change: Callable[[Features], Features] = list
        self.counts: list[int] = []

    def __call__(self, features: Features) -> Features:
        self.counts += map(len, features)
        return self.change(features)


@pytest.fixture
def tower(monkeypatch: pytest.MonkeyPatch) -> Tower:
    tower, original = Tower(), VisionEncoder.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        compute = self.mapping.compute_features
        self.mapping.compute_features = lambda *given: tower(compute(*given))

    monkeypatch.setattr(VisionEncoder, "__init__", __init__)
    return tower


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


def test_nothing_is_loaded_when_nothing_is_missing(
    folder: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "broken.png").unlink()
    assert run(folder, output, "--pooling", "image") == 0
    assert {rows.shape for rows in read(output).values()} == {(1, 256)}
    monkeypatch.setattr(embed, "_encoder", None)
    assert run(folder, output, "--pooling", "image") == 0
    assert run(folder, output, "--pooling", "base") == 2
    assert "nothing was begun: " in (said := capsys.readouterr().err)
    assert "was made with" in said


def test_a_shard_closes_before_memory_runs_out(
    folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 1)
    (folder / "broken.png").unlink()
    assert run(folder, output) == 0
    assert len(shards_of(output)) == 7
    shards_of(output)[2].unlink()
    before = {file: file.stat().st_mtime_ns for file in shards_of(output)}
    assert run(folder, output) == 0
    assert len(shards_of(output)) == 7
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())


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


def test_lists_of_pictures(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "asked.jsonl"
    first, second, third = (str(folder / f"{i}.png") for i in range(3))
    lines.write_text(
        json.dumps({"prompt": "What?", "images": [first, second]})
        + "\n\n"
        + json.dumps({"prompt": "And?", "images": [second]})
    )
    monkeypatch.setattr("sys.stdin", [f"{third}\n", "\n"])
    found = list(embed.find_pictures([str(lines), "-", first]))
    assert [str(path) for path in found] == [first, second, second, third, first]


@pytest.mark.parametrize("line", ["{", "[]", '{"images": "a.png"}', '{"images": [1]}', "{}"])
def test_a_line_without_pictures(
    tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "asked.jsonl"
    lines.write_text('{"images": []}\n' + line)
    assert run(lines, tmp_path / "features.safetensors") == 2
    assert "asked.jsonl, line 2: this is no JSON object" in capsys.readouterr().err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
LINES = st.lists(
    JSON.map(json.dumps)
    | st.fixed_dictionaries({"images": JSON}).map(json.dumps)
    | st.lists(st.text(), max_size=3).map(lambda paths: json.dumps({"images": paths}))
    | st.sampled_from(["", "  ", "{", '{"images": [', "[" * 100_000]),
    max_size=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LINES.map(lambda lines: "\n".join(lines).encode()) | st.binary(max_size=60))
def test_a_list_is_read_or_its_line_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_bytes(content)
    said = ""
    try:
        found = list(embed.find_pictures([str(file)]))
    except ValueError as error:
        said = str(error)
    lines = content.split(b"\n")
    if said:
        (number,) = re.findall(r"asked.jsonl, line (\d+): this is no JSON object", said)
        assert lines[int(number) - 1].strip()
    else:
        listed = [json.loads(line)["images"] for line in lines if line.strip()]
        assert found == [Path(path) for paths in listed for path in paths]


MADE_WITH = {"model": "m"}


def test_shards_of_another_output_are_left_alone(tmp_path: Path) -> None:
    """Also where the output's name is a pattern."""
    names = ("a.safetensors", "a-1.safetensors", "[ab]*.safetensors")
    for name in names:
        found = shards.Shards(tmp_path / name, 1, MADE_WITH)
        assert found.index == {}
        found.add(f"of {name}", torch.ones(1, 2))
    for name in names:
        assert list(shards.Shards(tmp_path / name, 1, MADE_WITH).index) == [f"of {name}"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.integers(0, 80), st.integers(0, 255))
def test_a_damaged_shard_is_named(tmp_path: Path, damage: bytes | int, byte: int) -> None:
    output, file = tmp_path / "a.safetensors", tmp_path / "a-00001.safetensors"
    file.unlink(missing_ok=True)
    shards.Shards(output, 1, MADE_WITH).add("first", torch.ones(1, 2))
    content = bytearray(file.read_bytes())
    if isinstance(damage, int):
        content[damage] = byte
    file.write_bytes(content if isinstance(damage, int) else damage)
    said = ""
    try:
        assert len(shards.Shards(output, 1, MADE_WITH).index) <= 1
    except ValueError as error:
        said = str(error)
    assert not said or re.match(rf"{re.escape(str(file))} (cannot be read|was made with)", said)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(50) + b"PAR1", b"x" * 99])
def test_a_damaged_table_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a-00001.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"a-00001.parquet cannot be read"):
        shards.Shards(tmp_path / "a.parquet", 1, MADE_WITH)


def test_no_decoder_is_loaded(demo_checkpoint: Path) -> None:
    encoder = VisionEncoder(str(demo_checkpoint), torch.float32, backend="eager")
    names = [name for name, _ in encoder.model.named_parameters()]
    assert names
    assert not [name for name in names if name.startswith("language_model")]


def test_no_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, tmp_path / "features.safetensors") == 1
    assert "no pictures were given" in capsys.readouterr().err

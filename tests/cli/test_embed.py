# SPDX-License-Identifier: Apache-2.0
"""Features in bulk: real files, the embedded checkpoint, real shards."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.embedding_runs import read, read_shard, run, shards_of
from tests.multimodal.mm_mappings.suite import assert_close
from tests.reference import Reference
from vllm_spyre_mm.cli import embed
from vllm_spyre_mm.cli.encoder import VisionEncoder
from vllm_spyre_mm.demo import pictures

QUESTION = "<|user|>\n<image>\nWhat?\n<|assistant|>\n"


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


def test_no_decoder_is_loaded(demo_checkpoint: Path) -> None:
    encoder = VisionEncoder(str(demo_checkpoint), torch.float32, backend="eager")
    names = [name for name, _ in encoder.model.named_parameters()]
    assert names
    assert not [name for name in names if name.startswith("language_model")]

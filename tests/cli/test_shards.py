# SPDX-License-Identifier: Apache-2.0
"""Shards of features: what is damaged or made otherwise is named."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.embedding_runs import run, shards_of
from vllm_spyre_mm.cli import shards


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

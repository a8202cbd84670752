# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that a start would refuse, most of them after minutes, are refused in seconds."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import edit_config, edit_tensors
from tests.doctor.findings import only
from vllm_spyre_mm import host_memory
from vllm_spyre_mm.doctor import examine, model
from vllm_spyre_mm.host_memory import HostMemory


@pytest.fixture
def checkpoint(demo_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(demo_checkpoint, tmp_path / "model")


@pytest.fixture
def sharded(checkpoint: Path) -> Path:
    """The same checkpoint in three files with an index."""
    stored = load_file(checkpoint / "model.safetensors")
    names = sorted(stored)
    where = {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        part = {name: stored[name] for name in names[number::3]}
        save_file(part, checkpoint / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (checkpoint / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": where}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    return checkpoint


def test_a_good_checkpoint(sharded: Path) -> None:
    assert "served by GraniteVision" in only(model.configuration(sharded)).says
    assert "with a chat template" in only(model.processor(sharded)).says
    assert "3 files" in only(model.files(sharded)).says
    assert "every one accounted for" in only(model.weights(sharded)).says


def test_no_folder_and_no_configuration(tmp_path: Path) -> None:
    finding = only(model.configuration(tmp_path / "nowhere"))
    assert (finding.level, finding.says) == ("error", f"{tmp_path / 'nowhere'} is no folder")
    assert "has no config.json" in only(model.configuration(tmp_path)).says


def test_a_model_that_is_not_served(checkpoint: Path) -> None:
    edit_config(checkpoint, text_config__hidden_act="tanh_of_my_own")
    finding = only(model.configuration(checkpoint))
    assert finding.level == "error"
    assert "is not supported on Spyre as configured" in finding.says


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    finding = only(model.files(sharded))
    assert finding.level == "error"
    assert finding.says.startswith("model-00002-of-00003.safetensors, with ")
    assert finding.says.endswith("tensors, is missing")
    assert "missing: " in only(model.weights(sharded)).says


def test_a_truncated_shard_and_a_pointer(sharded: Path) -> None:
    first, second = (sharded / f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    first.write_bytes(first.read_bytes()[:-100])
    second.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    truncated, pointer = model.files(sharded)
    assert truncated.level == pointer.level == "error"
    assert truncated.says.startswith(f"{first.name} cannot be read: ")
    assert pointer.says == f"{second.name} is a pointer of git LFS"


def test_pickles_are_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert "save_pretrained" in only(model.files(checkpoint)).do
    (checkpoint / "pytorch_model.bin").unlink()
    assert "fetch the checkpoint again" in only(model.files(checkpoint)).do


def test_a_tensor_is_missing(checkpoint: Path) -> None:
    edit_tensors(checkpoint, {"image_newline": None})
    finding = only(model.weights(checkpoint))
    assert finding.level == "error"
    assert "missing: image_newline" in finding.says


def test_no_tokenizer(checkpoint: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    finding = only(model.processor(checkpoint))
    assert finding.level == "error"
    assert "the tokenizer or processor does not load" in finding.says


def test_a_model_that_does_not_fit(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "host_memory", lambda: HostMemory(2 << 30, 1 << 30))
    finding = only(model.weights(checkpoint))
    assert finding.level == "error"
    assert "of 0.8 GiB free" in finding.says


def test_random_weights_need_no_files(checkpoint: Path) -> None:
    stored = only(model.weights(checkpoint)).says
    (checkpoint / "model.safetensors").unlink()
    found = {each.check: each for each in examine(checkpoint, dummy_weights=True)}
    assert "files" not in found
    assert found["weights"].level == "ok"
    assert found["weights"].says.split(";")[0] == stored.split(",")[0] + ", made up at random"

# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are read: those of its index, or those that vLLM would read."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from vllm.model_executor.model_loader import weight_utils
from vllm.transformers_utils import repo_utils

from tests import architectures
from tests.checkpoints import edit_tensors, shard, write_index
from vllm_spyre_mm.model_executor.checkpoint import (
    INDEX,
    CheckpointError,
    find_checkpoint,
    weight_files,
)
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = architectures.llama(num_hidden_layers=1)
    return architectures.save_checkpoint(tmp_path_factory.mktemp("llama"), config)


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy, in one file."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


@pytest.fixture
def sharded(checkpoint: Path) -> Path:
    """A copy in two files, with an index."""
    assert tuple(file.name for file in shard(checkpoint, 2)) == SHARDS
    return checkpoint


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
    return load_model(mapping, checkpoint, LoadOptions(torch.float32, torch.float32)).state_dict()


def assert_same(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def put(folder: Path, file: str, *names: str) -> None:
    """Write a file with tensors of those names that are nothing of the model."""
    save_file({name: torch.zeros(2) for name in names}, folder / file, metadata={"format": "pt"})


# -- with an index --------------------------------------------------------------------------------

BESIDE = {
    "Mistral's own format": "consolidated.safetensors",
    "Mistral's own format in shards": "consolidated-00001-of-00002.safetensors",
    "the whole model again": "model.safetensors",
    "a variant": "model.fp16-00001-of-00002.safetensors",
    "shards of another number": "model-00001-of-00004.safetensors",
    "an adapter's weights": "adapter_model.safetensors",
    "an optimizer's state": "optimizer.safetensors",
}


@pytest.mark.parametrize("what", list(BESIDE))
def test_what_the_index_does_not_name_is_not_read(sharded: Path, original: Path, what: str):
    put(sharded, BESIDE[what], EMBEDDING, "layers.0.attention.wk.weight")
    assert_same(state(sharded), state(original))


def test_what_lies_in_folders_below_and_other_indexes_are_not_read(sharded: Path, original: Path):
    for folder in ("original", "onnx", "checkpoint-500"):
        (sharded / folder).mkdir()
        put(sharded / folder, "model.safetensors", EMBEDDING)
    for index in ("consolidated.safetensors.index.json", "model.safetensors.index.fp16.json"):
        (sharded / index).write_text(json.dumps({"weight_map": {EMBEDDING: "elsewhere"}}))
    (sharded / "pytorch_model.bin").write_bytes(b"no pickle")
    assert_same(state(sharded), state(original))


def test_a_tensor_is_read_from_the_file_that_the_index_places_it_in(sharded: Path, original: Path):
    """Whatever else that file, and the other one, hold under its name or besides."""
    first, second = (load_file(sharded / file) for file in SHARDS)
    assert EMBEDDING in first
    assert NORM in second
    spoilt = {EMBEDDING: torch.full_like(first[EMBEDDING], torch.nan), "more": torch.ones(1)}
    save_file(second | spoilt, sharded / SHARDS[1], metadata={"format": "pt"})
    assert_same(state(sharded), state(original))


def test_an_index_may_name_files_of_a_folder_below(sharded: Path, original: Path):
    (sharded / "shards").mkdir()
    where = {}
    for file in SHARDS:
        where |= dict.fromkeys(load_file(sharded / file), f"shards/{file}")
        (sharded / file).rename(sharded / "shards" / file)
    write_index(sharded, where)
    assert_same(state(sharded), state(original))


def test_an_error_says_what_was_read_what_is_absent_and_what_was_left_out(sharded: Path):
    put(sharded, "consolidated.safetensors", "output.weight")
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError) as error:
        state(sharded)
    message = str(error.value)
    assert "missing: " in message
    assert f"read: {SHARDS[0]} (as {INDEX} says)" in message
    assert f"named there, but absent: {SHARDS[1]}" in message
    assert "left out: consolidated.safetensors" in message


def test_an_index_of_files_that_are_all_absent_is_refused(sharded: Path):
    for file in SHARDS:
        (sharded / file).unlink()
    put(sharded, "consolidated.safetensors", "output.weight")
    with pytest.raises(CheckpointError, match=f"none of the files .* {SHARDS[0]}, {SHARDS[1]}"):
        state(sharded)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": ["b"]}}']
)
def test_an_index_that_cannot_be_read_is_named(sharded: Path, text: str):
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=f"{INDEX} cannot be read, and it says which files"):
        state(sharded)


# -- without an index -----------------------------------------------------------------------------


@pytest.mark.parametrize("consolidated", ["consolidated.safetensors", "consolidated-1.safetensors"])
def test_mistrals_own_format_is_left_out(checkpoint: Path, original: Path, consolidated: str):
    put(checkpoint, consolidated, "layers.0.attention.wk.weight")
    assert_same(state(checkpoint), state(original))


def test_shards_without_an_index_are_all_read(sharded: Path, original: Path):
    (sharded / INDEX).unlink()
    assert_same(state(sharded), state(original))


def test_files_that_an_operating_system_leaves_are_not_read(checkpoint: Path, original: Path):
    (checkpoint / "._model.safetensors").write_bytes(b"resource fork")
    (checkpoint / "cache.safetensors").mkdir()
    assert_same(state(checkpoint), state(original))


def test_the_files_of_an_unexpected_tensor_are_named(checkpoint: Path):
    put(checkpoint, "adapter_model.safetensors", "base_model.lora_A.weight")
    with pytest.raises(CheckpointError, match=r"unexpected: .*lora_A") as error:
        state(checkpoint)
    assert "read: adapter_model.safetensors, model.safetensors" in str(error.value)


def test_a_tensor_in_two_files_is_refused_with_both(checkpoint: Path):
    put(checkpoint, "model.fp16.safetensors", EMBEDDING)
    with pytest.raises(CheckpointError, match="twice") as error:
        state(checkpoint)
    assert f"{EMBEDDING} in model.fp16.safetensors" in str(error.value)
    assert f"{EMBEDDING} in model.safetensors" in str(error.value)


def test_a_tensor_stored_under_two_names_is_refused(llava_next_checkpoint: Path, tmp_path: Path):
    """Two layouts in one folder: which of them would win?"""
    checkpoint = Path(shutil.copytree(llava_next_checkpoint, tmp_path / "copy"))
    edit_tensors(checkpoint, {"model.language_model.embed_tokens.weight": torch.zeros(512, 256)})
    with pytest.raises(CheckpointError, match="twice") as error:
        state(checkpoint)
    assert "language_model.model.embed_tokens.weight in model.safetensors" in str(error.value)
    assert "model.language_model.embed_tokens.weight in model.safetensors" in str(error.value)


def test_mistrals_own_format_alone_is_refused_for_other_models(checkpoint: Path):
    (checkpoint / "model.safetensors").rename(checkpoint / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match="holds Mistral's own format alone") as error:
        state(checkpoint)
    assert "consolidated.safetensors" in str(error.value)


def test_a_folder_without_safetensors_is_refused_with_what_to_do(checkpoint: Path):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors.*save_pretrained") as error:
        weight_files(checkpoint)
    assert str(checkpoint) in str(error.value)


def test_an_adapter_beside_the_weights_is_refused(checkpoint: Path):
    """Transformers would apply it, where PEFT is installed."""
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds a LoRA adapter .*merge_and_unload"):
        state(checkpoint)


# -- where it is ----------------------------------------------------------------------------------


def model_config(model: Path | str) -> Any:
    return SimpleNamespace(model=str(model), revision=None)


def test_a_local_folder_is_the_checkpoint(checkpoint: Path):
    assert find_checkpoint(model_config(checkpoint), SimpleNamespace()) == checkpoint


@pytest.mark.parametrize("ignored", ["original/**/*", ["original/**/*"]])
def test_what_is_not_read_is_not_downloaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, ignored: str | list[str]
):
    """vLLM's own download follows the index, and takes any safetensors without one."""
    asked: dict[str, Any] = {}

    def download(*_: Any, **arguments: Any) -> str:
        asked.update(arguments)
        return str(checkpoint)

    monkeypatch.setattr(weight_utils, "download_weights_from_hf", download)
    monkeypatch.setattr(repo_utils, "file_or_path_exists", lambda *_: False)
    load_config = SimpleNamespace(download_dir=None, ignore_patterns=ignored)
    assert find_checkpoint(model_config("some/model"), load_config) == checkpoint
    assert asked["ignore_patterns"] == ["original/**/*", "consolidated*.safetensors"]
    assert asked["allow_patterns"] == ["*.safetensors"]


def test_an_adapter_on_the_hub_is_refused_before_anything_is_downloaded(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(repo_utils, "file_or_path_exists", lambda *_: True)
    with pytest.raises(CheckpointError, match="some/model holds a LoRA adapter"):
        find_checkpoint(model_config("some/model"), SimpleNamespace())

# SPDX-License-Identifier: Apache-2.0
"""A head is tied to the embedding, or not, as Transformers does: whatever the configuration says
and wherever it says it, and whatever is stored."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig
from vllm.config import ModelConfig

from tests import architectures, granite4_vision, idefics3
from tests.checkpoints import edit_config, edit_tensors, model_class, write_index
from vllm_spyre_mm.frontend.engine_config import _leave_head_to_loader
from vllm_spyre_mm.model_executor.checkpoint import CheckpointError
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping

ABSENT = "absent"
SETTINGS = (ABSENT, True, False)

SMALL = {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 432}
VISION: dict[str, Any] = {"vision_config.num_hidden_layers": 1, "vision_feature_layer": -1}

CONFIGS: dict[str, PretrainedConfig] = {
    "llava": architectures.llava(architectures.llama(**SMALL), **VISION),
    "llava_next": architectures.llava_next(architectures.granite(**SMALL), **VISION),
    "mistral3": architectures.mistral3(architectures.mistral(**SMALL), **VISION),
    "idefics3": idefics3.idefics3(
        architectures.llama(**SMALL | {"vocab_size": 480}), **{"vision_config.num_hidden_layers": 1}
    ),
    "granite4_vision": granite4_vision.granite4_vision(
        **{f"text_config.{name}": value for name, value in SMALL.items()}
        | {"text_config.num_hidden_layers": 4, "vision_config.num_hidden_layers": 1}
        | {"deepstack_layer_map": [], "spatial_target_layers": [0, 1, 2, 3]}
    ),
    "granite": architectures.granite(**SMALL),
    "granitemoehybrid": architectures.granite4(**SMALL, shared_intermediate_size=64),
    "llama": architectures.llama(**SMALL),
    "mistral": architectures.mistral(**SMALL),
    "qwen2": architectures.qwen2(**SMALL),
    "qwen3": architectures.qwen3(**SMALL),
}
BOTH = [name for name, config in CONFIGS.items() if hasattr(config, "text_config")]
ALONE = [name for name in CONFIGS if name not in BOTH]

STORED = {
    "no head": ("rest", "embedding"),
    "the embedding again": ("rest", "embedding", "same"),
    "another head": ("rest", "embedding", "other"),
    "the head alone": ("rest", "other"),
}
"""Files of what is stored."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each architecture a folder with the rest of the model, an embedding and two heads."""
    folders = {}
    for name, config in CONFIGS.items():
        folder = architectures.save_checkpoint(tmp_path_factory.mktemp(name), config)
        rest = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        head = next(each for each in rest if each.endswith("lm_head.weight"))
        embedding = next(each for each in rest if each.endswith("embed_tokens.weight"))
        table = rest[embedding]
        files = {
            "other": {head: rest.pop(head)},
            "embedding": {embedding: rest.pop(embedding)},
            "same": {head: table.clone()},
            "rest": rest,
        }
        for file, tensors in files.items():
            save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
        folders[name] = folder
    return folders


def checkpoint_of(
    path: Path, parts: Path, stored: str, top: bool | str, text: bool | str = ABSENT
) -> Path:
    """A checkpoint with those files, whose ``config.json`` says that and no more of the head."""
    config = json.loads((parts / "config.json").read_text())
    for part, value in ((config, top), (config.get("text_config", {}), text)):
        part.pop("tie_word_embeddings", None)
        if value != ABSENT:
            part["tie_word_embeddings"] = value
    (path / "config.json").write_text(json.dumps(config))
    where = {}
    for file in STORED[stored]:
        name = f"{file}.safetensors"
        (path / name).symlink_to(parts / name)
        where |= dict.fromkeys(load_file(path / name), name)
    write_index(path, where)
    return path


def config_of(checkpoint: Path, *, in_engine: bool) -> Any:
    """The configuration as it is stored, or as it is after vLLM and the platform prepared it."""
    config = AutoConfig.from_pretrained(checkpoint)
    if in_engine:
        engines: Any = SimpleNamespace(
            hf_config=config,
            model=str(checkpoint),
            revision=None,
            word_embeddings_untied_by_checkpoint=False,
        )
        ModelConfig.maybe_untie_word_embeddings(engines)
        _leave_head_to_loader(engines)
    return config


def load(checkpoint: Path, *, in_engine: bool = False) -> Any:
    mapping = get_mm_mapping(config_of(checkpoint, in_engine=in_engine))
    options = LoadOptions(torch.float32, torch.float32)
    return load_model(mapping, checkpoint, options).language_model


def assert_as_transformers(checkpoint: Path) -> None:
    """The same head and embedding; a sentence where Transformers makes one of them up."""
    config = AutoConfig.from_pretrained(checkpoint)
    reference, report = model_class(config).from_pretrained(checkpoint, output_loading_info=True)
    for in_engine in (False, True):
        if report["missing_keys"]:
            assert_refused(checkpoint, report["missing_keys"], in_engine=in_engine)
            continue
        model = load(checkpoint, in_engine=in_engine)
        head, embedding = reference.get_output_embeddings(), reference.get_input_embeddings()
        assert torch.equal(model.head.weight, head.weight)
        assert torch.equal(model.base_model.embedding.weight, embedding.weight)
        tied = head.weight is embedding.weight
        assert (model.head.weight is model.base_model.embedding.weight) == tied


def assert_refused(checkpoint: Path, missing: set[str], *, in_engine: bool) -> None:
    """With the settings, if it is the head that is missing."""
    with pytest.raises(CheckpointError, match="cannot be served; missing: ") as error:
        load(checkpoint, in_engine=in_engine)
    if any("lm_head" in name for name in missing):
        assert "tie_word_embeddings is False" in str(error.value)
        has_parts = "text_config" in json.loads((checkpoint / "config.json").read_text())
        assert has_parts == ("text_config.tie_word_embeddings is" in str(error.value))


@pytest.mark.parametrize("stored", list(STORED))
@pytest.mark.parametrize("name", BOTH)
def test_both_settings_and_what_is_stored(
    parts: dict[str, Path], tmp_path: Path, name: str, stored: str
):
    for top, text in itertools.product(SETTINGS, SETTINGS):
        path = tmp_path / f"{top}-{text}"
        path.mkdir()
        checkpoint = checkpoint_of(path, parts[name], stored, top, text)
        assert_as_transformers(checkpoint)


@pytest.mark.parametrize("stored", list(STORED))
@pytest.mark.parametrize("name", ALONE)
def test_the_one_setting_of_a_text_model_and_what_is_stored(
    parts: dict[str, Path], tmp_path: Path, name: str, stored: str
):
    for setting in SETTINGS:
        path = tmp_path / str(setting)
        path.mkdir()
        checkpoint = checkpoint_of(path, parts[name], stored, setting)
        assert_as_transformers(checkpoint)


# -- a checkpoint in one file ---------------------------------------------------------------------

HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture
def tied(llava_next_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with a head that is the embedding, which is stored alone."""
    path = Path(shutil.copytree(llava_next_checkpoint, tmp_path / "copy"))
    edit_config(path, tie_word_embeddings=True, text_config__tie_word_embeddings=True)
    edit_tensors(path, {HEAD: None})
    return path


def test_without_a_head_and_an_embedding_the_embedding_is_missing(tied: Path):
    edit_tensors(tied, {EMBEDDING: None})
    with pytest.raises(CheckpointError, match=r"missing: language_model.*embedding\.weight"):
        load(tied)


def test_two_that_differ_are_kept_with_a_warning(tied: Path, caplog: pytest.LogCaptureFixture):
    """FMS would let the head replace the embedding."""
    edit_tensors(tied, {HEAD: torch.randn(512, 256)})
    model = load(tied)
    assert not torch.equal(model.head.weight, model.base_model.embedding.weight)
    assert f"{HEAD} in model.safetensors and {EMBEDDING} in model.safetensors" in caplog.text


def test_a_head_of_another_dtype_is_compared_in_the_models(tied: Path):
    embedding = load_file(tied / "model.safetensors")[EMBEDDING].bfloat16()
    edit_tensors(tied, {HEAD: embedding, EMBEDDING: embedding.float()})
    model = load(tied)
    assert model.head.weight is model.base_model.embedding.weight

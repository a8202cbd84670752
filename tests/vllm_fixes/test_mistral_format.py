# SPDX-License-Identifier: Apache-2.0
"""Repositories that hold a model in Mistral's format too are served without a flag."""

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Mistral3Config, MistralConfig, PretrainedConfig
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils import repo_utils

from tests import architectures
from vllm_spyre_mm.model_executor.checkpoint import find_checkpoint
from vllm_spyre_mm.vllm_fixes import mistral_format

PARAMS = {
    "dim": 128,
    "n_layers": 1,
    "head_dim": 48,
    "hidden_dim": 302,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "vocab_size": 520,
}
VISION = {
    "hidden_size": 96,
    "num_channels": 3,
    "image_size": 96,
    "patch_size": 8,
    "intermediate_size": 203,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "rope_theta": 1e4,
    "image_token_id": 10,
    "image_break_token_id": 12,
    "image_end_token_id": 13,
    "mm_projector_id": "patch_merge",
    "spatial_merge_size": 2,
    "add_pre_mm_projector_layer_norm": True,
    "adapter_bias": False,
}


def tekken() -> dict[str, Any]:
    """The bytes and some words of one of Mistral's tokenizers."""
    (file,) = (Path(mistral_common.__file__).parent / "data").glob("tekken_240911.json")
    whole = json.loads(file.read_text())
    sizes = {"default_vocab_size": 500, "default_num_special_tokens": 100}
    return whole | {"vocab": whole["vocab"][:400], "config": whole["config"] | sizes}


def save_in_both_formats(path: Path, config: PretrainedConfig) -> Path:
    architectures.save_checkpoint(path, config)
    params = PARAMS | ({"vision_encoder": VISION} if hasattr(config, "vision_config") else {})
    (path / "params.json").write_text(json.dumps(params))
    (path / "tekken.json").write_text(json.dumps(tekken()))
    weights = {"layers.0.attention.wk.weight": torch.zeros(2)}
    save_file(weights, path / "consolidated.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def mistral3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = architectures.mistral3(architectures.mistral(num_hidden_layers=1))
    return save_in_both_formats(tmp_path_factory.mktemp("mistral3"), config)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = architectures.mistral(num_hidden_layers=1)
    return save_in_both_formats(tmp_path_factory.mktemp("mistral"), config)


@pytest.fixture
def copy(mistral3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mistral3, tmp_path / "copy"))


def configure(cls: type[EngineArgs] = EngineArgs, **arguments: Any) -> VllmConfig:
    return cls(**arguments).create_engine_config()


@pytest.mark.parametrize("cls", [EngineArgs, AsyncEngineArgs])
def test_a_model_with_images_is_served_from_the_half_of_hugging_face(
    mistral3: Path, cls: type[EngineArgs]
):
    config = configure(cls, model=str(mistral3))
    model_config = config.model_config
    assert type(model_config.hf_config) is Mistral3Config
    assert find_checkpoint(model_config, config.load_config) == mistral3
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    picture = {"image": [Image.new("RGB", (30, 20), "red")]}
    items = processor.info.parse_mm_data(picture, validate=False)
    processed = processor([architectures.PIXTRAL_TOKEN_ID], items)
    assert processed["prompt_token_ids"] == [420, 420, 421, 420, 420, 422]


def test_a_text_model_is_too(mistral: Path):
    model_config = configure(model=str(mistral)).model_config
    assert type(model_config.hf_config) is MistralConfig
    assert (model_config.config_format, model_config.tokenizer_mode) == ("hf", "hf")


def test_a_text_model_without_another_tokenizer_keeps_mistrals(mistral: Path, tmp_path: Path):
    path = Path(shutil.copytree(mistral, tmp_path / "copy"))
    (path / "tokenizer.json").unlink()
    model_config = configure(model=str(path)).model_config
    assert (model_config.config_format, model_config.tokenizer_mode) == ("hf", "auto")
    assert mistral_format.uses_own_tokenizer(model_config)


def test_other_models_are_left_alone(demo_checkpoint: Path):
    model_config = configure(model=str(demo_checkpoint)).model_config
    assert (model_config.config_format, model_config.tokenizer_mode) == ("auto", "auto")


def test_a_tokenizer_of_its_own_is_looked_at_by_itself(mistral3: Path, demo_checkpoint: Path):
    arguments = EngineArgs(model=str(mistral3), tokenizer=str(demo_checkpoint))
    mistral_format.resolve_formats(arguments)
    assert (arguments.config_format, arguments.tokenizer_mode) == ("hf", "auto")


def test_a_repository_of_the_hub_is_asked_by_name_and_revision(monkeypatch: pytest.MonkeyPatch):
    files = ["consolidated.safetensors", "params.json", "config.json", "tokenizer.json"]
    asked = []

    def list_repo_files(repo_id: str, *, revision: str | None, **_: Any) -> list[str]:
        asked.append((repo_id, revision))
        return files

    monkeypatch.setattr(repo_utils, "list_repo_files", list_repo_files)
    arguments = EngineArgs(model="some/model", revision="v1")
    mistral_format.resolve_formats(arguments)
    assert (arguments.config_format, arguments.tokenizer_mode) == ("hf", "hf")
    assert set(asked) == {("some/model", "v1")}


# -- what is refused ------------------------------------------------------------------------------


def test_pictures_need_the_tokenizer_of_hugging_face(copy: Path):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"Mistral's own tokenizer .* name a repository that has"):
        configure(model=str(copy))


def test_mistrals_format_alone_is_refused_with_what_to_do(copy: Path):
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"'pixtral' is not supported .*fetch config\.json and"):
        configure(model=str(copy))


@pytest.mark.parametrize(
    ("flag", "value"),
    [("config_format", "mistral"), ("load_format", "mistral"), ("load_format", "pt")],
)
def test_the_other_format_is_refused_by_its_flag(mistral3: Path, flag: str, value: str):
    name = flag.replace("_", "-")
    with pytest.raises(ValueError, match=f"not supported on Spyre: {name}='{value}'"):
        configure(model=str(mistral3), **{flag: value})


def test_mistrals_tokenizer_is_refused_by_its_flag(mistral3: Path):
    with pytest.raises(ValueError, match=r"\(--tokenizer-mode mistral, or a repository without"):
        configure(model=str(mistral3), tokenizer_mode="mistral")

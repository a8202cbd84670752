# SPDX-License-Identifier: Apache-2.0
"""``vllm-spyre-mm models`` lists what is served and checks a configuration without its weights."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import Mistral3Config, PretrainedConfig, Qwen3VLMoeConfig, WhisperConfig

from tests import architectures
from vllm_spyre_mm.cli import main
from vllm_spyre_mm.model_executor.models.decoders import DECODERS
from vllm_spyre_mm.multimodal.mm_mappings import MAPPINGS
from vllm_spyre_mm.multimodal.mm_mappings.not_yet import NOT_YET
from vllm_spyre_mm.multimodal.mm_mappings.not_yet_architectures import ARCHITECTURES


def saved(path: Path, config: PretrainedConfig) -> str:
    """A folder with a configuration and nothing else."""
    config.save_pretrained(path)
    return str(path)


def test_everything_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    for mapping in MAPPINGS:
        assert f"{mapping.__name__} " in listed
        assert mapping.summary in listed
    for name in (*DECODERS, *NOT_YET):
        assert f"\n  {name} " in listed
    words = listed.split()
    for name, why in ARCHITECTURES.items():
        assert name in words
        assert f"\n  {why}\n" in listed
    assert max(map(len, listed.splitlines())) < 200
    assert "Qwen3-VL" not in listed
    assert "qwen3_vl" in listed


SERVED: dict[str, tuple[PretrainedConfig, list[str]]] = {
    "LLaVA-Next": (
        architectures.llava_next(architectures.mistral(head_dim=128)),
        [
            "served by LlavaNext",
            "mistral, 3 layers, 2 KV heads of 128",
            "clip_vision_model, 3 of 4 layers, images of 48 in patches of 8",
            "KV cache  3 KiB a token",
            "card      heads of 128",
        ],
    ),
    "heads that no card takes": (
        architectures.mistral3(architectures.mistral(head_dim=96)),
        ["served by Mistral3", "card      no: heads of 96 cannot be padded to the 128"],
    ),
    "a text model": (architectures.granite(head_dim=64), ["TextDecoder", "card      heads of 128"]),
}


@pytest.mark.parametrize("name", list(SERVED))
def test_a_model_that_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config, expected = SERVED[name]
    assert main(["models", saved(tmp_path, config)]) == 0
    printed = capsys.readouterr().out
    for words in expected:
        assert words in printed
    assert main(["models", str(tmp_path / "config.json")]) == 0
    assert capsys.readouterr().out == printed


REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "experts": (Qwen3VLMoeConfig(), "'qwen3_vl_moe' is not supported.*not yet: a mixture"),
    "audio": (WhisperConfig(), "'whisper' is not supported.*not yet: audio"),
    "a window": (architectures.mistral(sliding_window=64), "sliding_window 64"),
    "quantised": (
        architectures.llama(quantization_config={"quant_method": "fp8"}),
        "quantization_config is 'fp8'",
    ),
    "a quantised decoder": (
        architectures.mistral3(architectures.mistral(quantization_config={"quant_method": "gptq"})),
        "quantization_config is 'gptq'",
    ),
    "another vision tower": (
        Mistral3Config(vision_config=architectures.clip().to_dict()),
        "vision_config.model_type 'clip_vision_model' is not implemented, only pixtral",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_model_that_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config, why = REFUSED[name]
    folder = saved(tmp_path, config)
    assert main(["models", folder]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert re.search(why, captured.err)
    assert captured.err.startswith(f"{folder}: ")


@pytest.mark.parametrize("where", ["missing", "missing.json", "empty"])
def test_there_is_no_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: Any
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["models", str(tmp_path / where)]) == 1
    assert str(tmp_path / where) in capsys.readouterr().err

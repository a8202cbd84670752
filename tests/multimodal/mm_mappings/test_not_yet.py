# SPDX-License-Identifier: Apache-2.0
"""Every multimodal architecture of vLLM is served, or is named with the reason why it is not."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
import vllm
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from vllm.model_executor.models import registry

from tests import architectures
from vllm_spyre_mm.multimodal.mm_mappings import MAPPINGS, UnsupportedModelError, get_mm_mapping
from vllm_spyre_mm.multimodal.mm_mappings.not_yet import AUDIO, NOT_YET
from vllm_spyre_mm.multimodal.mm_mappings.not_yet_architectures import (
    ARCHITECTURES,
    DECODER,
    EXPERTS,
    NAMES,
    STATE,
    TOWER,
    why_not_yet,
)

NEWER = {
    "Alpamayo2Super",
    "MiniCPMOcrForConditionalGeneration",
    "MuseSparkForConditionalGeneration",
    "RadioMBartPrefixForCausalLM",
    "Step5ForConditionalGeneration",
}
"""Of the newest vLLM that is tested; older ones do not have them."""

USUAL = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
"""The architecture by Transformers' ``model_type``."""


def vllms() -> dict[str, tuple[str, str]]:
    """vLLM's multimodal architectures, with the module and the class of each."""
    others = registry._TRANSFORMERS_SUPPORTED_MODELS.items()
    return registry._MULTIMODAL_MODELS | {
        name: where for name, where in others if "MultiModal" in where[1]
    }


def served() -> Iterator[str]:
    for mapping in MAPPINGS:
        for name in mapping.config_classes:
            library, _, class_name = name.partition(".")
            if library == "transformers":
                model_type = getattr(transformers, class_name).model_type
                yield from filter(None, [USUAL.get(model_type)])


def test_every_architecture_of_vllm_is_served_or_named() -> None:
    named = {USUAL[model_type] for model_type in NOT_YET if model_type in USUAL}
    assert len(vllms()) > 100
    assert set(vllms()) - set(served()) - named - set(ARCHITECTURES) == set()


def test_what_is_named_is_vllms_and_is_not_served() -> None:
    named = {USUAL[model_type] for model_type in NOT_YET if model_type in USUAL}
    assert set(ARCHITECTURES) - set(vllms()) <= NEWER
    assert not set(ARCHITECTURES) & set(served())
    assert not set(ARCHITECTURES) & named
    assert not named & set(served())
    assert sum(len(names.split()) for names in NAMES.values()) == len(ARCHITECTURES)


def source(architecture: str) -> str:
    """vLLM's code of an architecture, with that of the modules that it takes parts from."""
    module, _ = vllms()[architecture]
    if "." in module:
        folder = Path(vllm.__file__).parent.joinpath(*module.split(".")[1:])
        return "\n".join(file.read_text() for file in folder.rglob("*.py"))
    texts: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = Path(registry.__file__).with_name(f"{name}.py")
        if name in texts or name.startswith("interfaces") or not file.exists():
            continue
        texts[name] = file.read_text()
        waiting += re.findall(r"^from \.(\w+) import", texts[name], re.M)
    return "\n".join(texts.values())


ELSEWHERE = {"Ovis2_6_MoeForCausalLM", "VibeVoiceAsrForConditionalGeneration"}
"""Their decoder is looked up by the configuration, or they are run by Transformers."""

SIGNS = {AUDIO: '"audio"', STATE: "IsHybrid", EXPERTS: "experts"}


@pytest.mark.parametrize("reason", list(SIGNS))
def test_reasons_are_true_of_vllms_code(reason: str) -> None:
    names = [name for name in NAMES[reason].split() if name in set(vllms()) - ELSEWHERE]
    assert len(names) > 5
    assert [name for name in names if SIGNS[reason] not in source(name)] == []


BY_MODEL_TYPE: dict[str, tuple[PretrainedConfig, str]] = {
    "gemma3": (transformers.Gemma3Config(), DECODER),
    "internvl": (transformers.InternVLConfig(), TOWER),
    "qwen3_5": (transformers.Qwen3_5Config(), STATE),
    "llama4": (transformers.Llama4Config(), EXPERTS),
}


@pytest.mark.parametrize("model_type", list(BY_MODEL_TYPE))
def test_a_refusal_says_the_reason_by_model_type(model_type: str) -> None:
    config, reason = BY_MODEL_TYPE[model_type]
    with pytest.raises(UnsupportedModelError) as error:
        get_mm_mapping(config)
    assert f"model type {model_type!r}" in str(error.value)
    assert f"not yet: {reason}" in str(error.value)


def test_a_refusal_says_the_reason_by_architecture() -> None:
    """Of models whose configuration comes with their checkpoint."""

    class Remote(PretrainedConfig):
        model_type = "internvl_chat"

    with pytest.raises(UnsupportedModelError, match=f"not yet: {TOWER}"):
        get_mm_mapping(Remote(architectures=["InternVLChatModel"]))
    with pytest.raises(UnsupportedModelError, match=f"not yet: {AUDIO}"):
        get_mm_mapping(Remote(architectures=["GraniteSpeechPlusForConditionalGeneration"]))
    with pytest.raises(UnsupportedModelError) as error:
        get_mm_mapping(Remote(architectures=["NobodysModel"]))
    assert "not yet" not in str(error.value)


@pytest.mark.parametrize(
    "config", [architectures.llama(), architectures.llava(architectures.llama())]
)
def test_what_is_served_has_no_reason(config: Any) -> None:
    assert why_not_yet(config) is None

# SPDX-License-Identifier: Apache-2.0
"""Looking up a mapping: what none serves is refused with what is served."""

from typing import Any

import pytest
from transformers import PretrainedConfig, Qwen2MoeConfig, Qwen2VLConfig, Qwen3VLConfig

from tests.checkpoints import llava_next_config
from vllm_spyre_mm.multimodal.mm_mappings import (
    MAPPINGS,
    MM_CFG_MAPPING,
    MMUtils,
    UnsupportedModelError,
    get_mm_mapping,
)


class HomeMadeConfig(PretrainedConfig):
    model_type = "home_made"


class NoConfig:
    """Not a configuration at all."""


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        (Qwen2MoeConfig(), "qwen2_moe"),
        (Qwen2VLConfig(), "qwen2_vl"),
        (Qwen3VLConfig(), "qwen3_vl"),
        (HomeMadeConfig(), "home_made"),
        (NoConfig(), "tests.NoConfig"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_model_is_refused_with_what_is_supported(config: Any, model_type: str):
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}' is not supported") as error:
        get_mm_mapping(config)
    for mapping in MAPPINGS:
        assert f"{mapping.__name__} ({mapping.summary})" in str(error.value)


def test_a_config_of_the_same_name_from_elsewhere_is_unknown():
    """The library is part of the key: remote code may call its class what it likes."""

    class LlavaNextConfig(HomeMadeConfig):
        pass

    with pytest.raises(UnsupportedModelError):
        get_mm_mapping(LlavaNextConfig())


def test_a_refusal_says_why_each_candidate_declines():
    config = llava_next_config(projector_hidden_act="relu")
    with pytest.raises(UnsupportedModelError) as error:
        get_mm_mapping(config)
    why = str(error.value).partition("Supported:")[0]
    assert "LlavaNext: projector_hidden_act 'relu' is not implemented" in why
    assert "GraniteVision: it takes a list of vision_feature_layers" in why


def test_the_table_lists_every_mapping_under_every_class_it_names():
    listed = {(name, mapping) for name, mappings in MM_CFG_MAPPING.items() for mapping in mappings}
    assert listed == {(name, mapping) for mapping in MAPPINGS for name in mapping.config_classes}
    assert all(issubclass(mapping, MMUtils) for mapping in MAPPINGS)


def test_a_configuration_of_fms_is_a_key_that_cannot_say_everything():
    """It lacks what a checkpoint has and FMS ignores, so no predicate could decide."""
    from fms.models.llava_next import LlavaNextConfig

    assert "fms.LlavaNextConfig" in MM_CFG_MAPPING
    with pytest.raises(UnsupportedModelError, match="give the Transformers configuration"):
        get_mm_mapping(LlavaNextConfig())

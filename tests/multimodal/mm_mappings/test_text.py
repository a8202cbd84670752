# SPDX-License-Identifier: Apache-2.0
"""Text models: each decoder alone."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from tests import architectures
from tests.checkpoints import with_changes
from tests.multimodal.mm_mappings.text_suite import FP32, TextMappingSuite, assert_close
from tests.reference import Reference
from vllm_spyre_mm.model_executor.loader import load_model
from vllm_spyre_mm.model_executor.models.decoders import DECODERS
from vllm_spyre_mm.multimodal.mm_mappings import (
    TextDecoder,
    UnsupportedModelError,
    get_mm_mapping,
)

NARROW = {"num_attention_heads": 1, "num_key_value_heads": 1}
"""One head as wide as the model, which is what the card wants."""


class DecoderSuite(TextMappingSuite):
    mapping_class = TextDecoder
    text: ClassVar[PretrainedConfig]

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return architectures.save_checkpoint(tmp_path_factory.mktemp("text"), cls.text)

    @pytest.fixture
    def other(self) -> Any:
        return architectures.llava(architectures.llama())

    def test_there_is_nothing_of_pictures(self, mapping: TextDecoder, model: Any):
        assert mapping.image_token_id is None
        assert mapping.warmup_image_sizes() == []
        assert mapping.compute_features(model, {}) == []
        assert not mapping.load_overrides().encoder_blocks(model)


class TestGranite(DecoderSuite):
    text = architectures.granite(head_dim=64)


class TestGranite4(DecoderSuite):
    text = architectures.granite4(num_attention_heads=2, num_key_value_heads=1)


class TestLlama(DecoderSuite):
    text = architectures.llama(**NARROW)


class TestMistral(DecoderSuite):
    text = architectures.mistral(head_dim=128)


class TestMinistral3(DecoderSuite):
    text = architectures.ministral3(head_dim=128)


class TestQwen2(DecoderSuite):
    text = architectures.qwen2(**NARROW)


class TestQwen3(DecoderSuite):
    text = architectures.qwen3(head_dim=128)


def test_every_decoder_is_tested_and_has_its_configuration_listed() -> None:
    suites = DecoderSuite.__subclasses__()
    assert {suite.text.model_type for suite in suites} == DECODERS.keys()
    listed = {type(suite.text).__name__ for suite in suites}
    names = TextDecoder.config_classes
    assert listed == {name.split(".")[1] for name in names if name.startswith("transformers.")}


def test_positions_beyond_the_first_length_of_ministral_3_are_scaled(tmp_path: Path) -> None:
    """Its queries grow with the position, beyond ``original_max_position_embeddings``."""
    text = architectures.ministral3()
    assert text.rope_parameters["original_max_position_embeddings"] == 256
    checkpoint = architectures.save_checkpoint(tmp_path, text)
    mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
    model, reference = load_model(mapping, checkpoint, FP32), Reference(checkpoint)
    token_ids = torch.randint(10, 400, (1, 600))
    with torch.inference_mode():
        ours = model(
            mapping.embed_tokens(model, token_ids),
            position_ids=torch.arange(600).unsqueeze(0),
            attn_name="sdpa_causal",
        )
        assert_close(ours, reference.model(token_ids).logits, 1e-4)


REFUSED: dict[str, PretrainedConfig] = {
    "rope_type 'linear'": architectures.granite(
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "rope_type 'default'": architectures.ministral3(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "sliding_window 4096": architectures.mistral(sliding_window=4096),
    "head_dim 48": architectures.llama(head_dim=48),
    "sliding_window 64": architectures.qwen2(
        use_sliding_window=True, sliding_window=64, max_window_layers=1
    ),
    "hidden_act 'gelu'": architectures.llama(hidden_act="gelu"),
    "attention_bias": architectures.granite(attention_bias=True),
    "num_local_experts 4": architectures.granite4(num_local_experts=4, num_experts_per_tok=2),
    "position_embedding_type 'nope'": architectures.granite4(position_embedding_type="nope"),
    "layer_types has 'linear_attention'": architectures.granite4(
        layer_types=["full_attention", "linear_attention", "full_attention"]
    ),
    "shared_intermediate_size": architectures.granite4(
        hidden_size=116, shared_intermediate_size=1001
    ),
    "num_attention_heads 4": architectures.mistral(num_key_value_heads=3),
}


@pytest.mark.parametrize("named", list(REFUSED))
def test_what_would_not_be_honoured_is_refused_by_name(named: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        get_mm_mapping(REFUSED[named])
    assert f"TextDecoder: {named}" in str(error.value)


def test_a_layer_of_another_kind_is_refused() -> None:
    mixed = ["full_attention", "sliding_attention", "full_attention"]
    config = with_changes(architectures.qwen3(), {"layer_types": mixed})
    with pytest.raises(UnsupportedModelError, match="layer_types has 'sliding_attention'"):
        get_mm_mapping(config)

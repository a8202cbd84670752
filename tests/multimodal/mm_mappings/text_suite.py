# SPDX-License-Identifier: Apache-2.0
"""What every mapping has to pass, also one of a text model. A test module subclasses the suite.

Transformers on the same checkpoint is the reference for everything that is computed.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from tests.reference import Reference
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.multimodal.merge import TEXT
from vllm_spyre_mm.multimodal.mm_mappings import (
    MM_CFG_MAPPING,
    MMUtils,
    config_name,
    get_mm_mapping,
)

FP32 = LoadOptions(decoder_dtype=torch.float32, encoder_dtype=torch.float32)
BF16 = LoadOptions(decoder_dtype=torch.bfloat16, encoder_dtype=torch.bfloat16)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """No element is off by more than ``tolerance`` times the largest one."""
    assert actual.shape == expected.shape
    error = (actual.float() - expected.float()).abs().max()
    assert error <= tolerance * expected.float().abs().max()


class TextMappingSuite:
    """Tests of one mapping; subclasses say which, and give the fixtures that raise here.

    A mapping that takes pictures has to pass :class:`MappingSuite`.
    """

    mapping_class: ClassVar[type[MMUtils]]

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls) -> Path:
        """Folder of a small checkpoint that the mapping serves."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, checkpoint: Path) -> Reference:
        """Transformers on that checkpoint, fp32."""
        return Reference(checkpoint)

    @pytest.fixture
    def other(self) -> Any:
        """A configuration that another mapping serves."""
        raise NotImplementedError

    # -- given by the above ----------------------------------------------------------------------

    @pytest.fixture
    def config(self, checkpoint: Path) -> Any:
        return AutoConfig.from_pretrained(checkpoint)

    @pytest.fixture
    def mapping(self, config: Any) -> MMUtils:
        return get_mm_mapping(config)

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, checkpoint: Path) -> Any:
        """The loaded FMS model, fp32."""
        mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
        return load_model(mapping, checkpoint, FP32)

    def prompt(self, reference: Reference, num_images: int) -> str:
        tag = reference.processor.image_token if num_images else ""
        return "".join(f"Picture {i} {tag} and" for i in range(num_images)) + " what is it?"

    def inputs_embeds(
        self,
        mapping: MMUtils,
        model: Any,
        reference: Reference,
        inputs: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """What the decoder is given."""
        return mapping.embed_tokens(model, inputs["input_ids"])

    # -- which configurations ------------------------------------------------------------------

    def test_its_own_configuration_is_served_by_it_alone(self, config: Any):
        candidates = MM_CFG_MAPPING[config_name(config)]
        accepting = [mapping for mapping in candidates if mapping.why_not(config) is None]
        assert accepting == [self.mapping_class]
        assert type(get_mm_mapping(config)) is self.mapping_class

    def test_it_leaves_the_configuration_of_another_mapping_alone(self, other: Any):
        assert type(get_mm_mapping(other)) is not self.mapping_class
        if self.mapping_class in MM_CFG_MAPPING[config_name(other)]:
            assert self.mapping_class.why_not(other) is not None

    def test_its_configuration_classes_are_listed(self, config: Any):
        assert config_name(config) in self.mapping_class.config_classes
        for name in self.mapping_class.config_classes:
            assert self.mapping_class in MM_CFG_MAPPING[name]

    def test_what_it_serves_is_said_in_a_few_words(self):
        assert 0 < len(self.mapping_class.summary) < 80

    # -- purity --------------------------------------------------------------------------------

    def test_no_method_changes_the_configuration(self, config: Any, checkpoint: Path):
        before = copy.deepcopy(config.to_dict())
        self.mapping_class.why_not(config)
        mapping = get_mm_mapping(config)
        for for_card in (False, True):
            mapping.kv_cache_options(for_card)
            mapping.load_overrides(for_card)
        mapping.warmup_image_sizes()
        model = load_model(mapping, checkpoint, FP32)
        text = mapping.embed_tokens(model, torch.zeros(1, 4, dtype=torch.int64))
        mapping.merge(text, text[0], torch.full((1, 4), TEXT))
        assert config.to_dict() == before

    # -- the decoder -----------------------------------------------------------------------------

    def decoder_arguments(
        self, mapping: MMUtils, model: Any, inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """What the decoder is called with beside embeddings."""
        return {"position_ids": torch.arange(inputs["input_ids"].shape[1]).unsqueeze(0)}

    def logits(
        self, mapping: MMUtils, model: Any, reference: Reference, images: list[Image.Image]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of all positions, from FMS and from Transformers; no KV cache is involved."""
        inputs = reference.inputs(self.prompt(reference, len(images)), images)
        embeds = self.inputs_embeds(mapping, model, reference, inputs)
        arguments = self.decoder_arguments(mapping, model, inputs)
        with torch.inference_mode():
            ours = model(embeds, **arguments, attn_name="sdpa_causal")
            theirs = reference.model(**inputs).logits
        return ours, theirs / reference.logits_scaling

    def test_logits_of_a_text_are_those_of_transformers(
        self, mapping: MMUtils, model: Any, reference: Reference
    ):
        assert_close(*self.logits(mapping, model, reference, []), 1e-4)

    def test_logits_with_heads_padded_for_the_card_are_those_of_transformers(
        self, mapping: MMUtils, checkpoint: Path, reference: Reference
    ):
        options = LoadOptions(torch.float32, torch.float32, for_card=True)
        model = load_model(mapping, checkpoint, options)
        assert_close(*self.logits(mapping, model, reference, []), 1e-4)

    # -- what the runner is told -----------------------------------------------------------------

    def attention_modules(self, mapping: MMUtils, model: Any, for_card: bool) -> list[Any]:
        blocks = mapping.load_overrides(for_card).decoder_blocks(model)
        return [block.attn for block in blocks]

    @pytest.mark.parametrize("for_card", [False, True])
    def test_the_kv_cache_has_the_shape_of_the_models_attention(
        self, mapping: MMUtils, checkpoint: Path, for_card: bool
    ):
        model = load_model(mapping, checkpoint, LoadOptions(torch.float32, torch.float32, for_card))
        options = mapping.kv_cache_options(for_card)
        modules = self.attention_modules(mapping, model, for_card)
        assert options.num_layers == len(modules)
        for attention in modules:
            assert attention.nheads == mapping.text_config.num_attention_heads
            assert attention.kvheads == options.num_kv_heads
            assert attention.emb_kq_per_head == options.head_dim
            assert attention.emb_v_per_head == options.head_dim

    def test_the_repeated_blocks_are_those_of_the_decoder(self, mapping: MMUtils, model: Any):
        decoder = mapping.load_overrides().decoder_blocks(model)
        assert len(decoder) == mapping.text_config.num_hidden_layers

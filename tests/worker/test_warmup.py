# SPDX-License-Identifier: Apache-2.0
"""What the warmup's requests are made of."""

import pytest
from transformers import Idefics3ImageProcessor, PretrainedConfig

from tests import architectures, idefics3
from tests.multimodal.mm_mappings.suite import picture
from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping
from vllm_spyre_mm.worker.warmup import made_up_tokens


@pytest.mark.parametrize(
    ("config", "special"),
    [
        (architectures.llava_next(architectures.llama(bos_token_id=3, eos_token_id=[4, 7])), 7),
        (architectures.granite(bos_token_id=None, eos_token_id=4), 5),
    ],
    ids=["with pictures", "text"],
)
def test_tokens_are_words_of_the_model(config: PretrainedConfig, special: int) -> None:
    """Never 0, the first or the last of a text, padding or a picture's."""
    mapping = get_mm_mapping(config)
    tokens = made_up_tokens(mapping, 20_000)
    text = mapping.text_config
    words = {*range(text.vocab_size)} - set(tokens)
    expected = {0, text.bos_token_id, text.pad_token_id, mapping.image_token_id, None}
    eos = text.eos_token_id
    expected |= {*eos} if isinstance(eos, list) else {eos}
    assert words == expected - {None}
    assert tokens == made_up_tokens(mapping, 20_000), "every rank has the same"


@pytest.mark.parametrize("tiles", [1, 2, 4])
@pytest.mark.parametrize("splits", [True, False])
def test_idefics3_is_shown_several_tiles_whatever_its_processor_does_unasked(
    tiles: int, splits: bool
) -> None:
    config = idefics3.idefics3(architectures.llama())
    mapping, side = get_mm_mapping(config), config.vision_config.image_size
    processor = Idefics3ImageProcessor(
        do_image_splitting=splits,
        size={"longest_edge": tiles * side},
        max_image_size={"longest_edge": side},
    )
    shown = picture(*mapping.warmup_image_sizes()[-1])
    made = processor([shown], return_tensors="pt", **mapping.warmup_processor_kwargs())
    assert made["pixel_values"].shape[:2] == (1, 3)

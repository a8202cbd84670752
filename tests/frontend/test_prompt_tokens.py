# SPDX-License-Identifier: Apache-2.0
"""A prompt whose tokens the model cannot take is refused with a sentence."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import PlaceholderRange

from tests.frontend.engine_requests import IMAGE, MODEL_CONFIG, WORD, request, sentence
from vllm_spyre_mm.frontend.request_validation import (
    validate_engine_request,
)


@pytest.mark.parametrize(
    ("tokens", "places"),
    [
        ([WORD, WORD], []),
        ([IMAGE], [(0, 1)]),
        ([WORD, IMAGE, IMAGE, WORD, IMAGE], [(1, 2), (4, 1)]),
        ([IMAGE, IMAGE, IMAGE, IMAGE], [(2, 2), (0, 2)]),
        ([IMAGE, WORD, IMAGE], [(0, 3)]),
    ],
    ids=["no picture", "nothing else", "two pictures", "side by side", "with a separator"],
)
def test_image_tokens_inside_placeholders_are_accepted(
    tokens: list[int], places: list[tuple[int, int]]
):
    validate_engine_request(request(tokens, *places), MODEL_CONFIG)


@pytest.mark.parametrize(
    ("tokens", "places", "count", "first"),
    [
        ([WORD, IMAGE], [], 1, 1),
        ([IMAGE, WORD, IMAGE, IMAGE], [], 3, 0),
        ([IMAGE, IMAGE, WORD, IMAGE], [(0, 2)], 1, 3),
        ([IMAGE, IMAGE, WORD, IMAGE], [(1, 1)], 2, 0),
        ([WORD, IMAGE, IMAGE, IMAGE, WORD], [(1, 2)], 1, 3),
        ([IMAGE, IMAGE, IMAGE], [(0, 1), (2, 1)], 1, 1),
    ],
    ids=["typed", "all", "behind", "before and behind", "one too many", "between"],
)
def test_image_tokens_outside_are_counted_and_the_first_is_named(
    tokens: list[int], places: list[tuple[int, int]], count: int, first: int
):
    refusal = sentence(tokens, *places)
    assert f"has {count} image token(s) (id {IMAGE}) that belong to no image" in refusal
    assert f"the first at position {first}:" in refusal


NUM_ROWS = MODEL_CONFIG.hf_config.text_config.vocab_size


def with_image_token(image_token_id: int) -> Any:
    config = copy.deepcopy(MODEL_CONFIG.hf_config)
    config.image_token_index = config.image_token_id = image_token_id
    return SimpleNamespace(hf_config=config, multimodal_config=None)


@pytest.mark.parametrize("token", [NUM_ROWS, NUM_ROWS + 1, 2**31])
def test_a_token_without_a_row_is_named(token: int):
    refusal = sentence([WORD, IMAGE, IMAGE, token, token], (1, 2))
    assert f"has token {token} at position 3, for which" in refusal
    assert f"embedding of {NUM_ROWS} rows has none" in refusal


def test_an_image_token_needs_no_row():
    config = with_image_token(NUM_ROWS + 3)
    validate_engine_request(request([WORD, NUM_ROWS + 3, NUM_ROWS - 1], (1, 1)), config)


def test_text_between_the_features_of_an_image_needs_one():
    config = with_image_token(NUM_ROWS)
    given = request([NUM_ROWS, NUM_ROWS + 1, NUM_ROWS], (0, 3))
    assert given.mm_features is not None
    mask = torch.tensor([True, False, True])
    given.mm_features[0].mm_position = PlaceholderRange(0, 3, is_embed=mask)
    with pytest.raises(VLLMValidationError, match=f"has token {NUM_ROWS + 1} at position 1,"):
        validate_engine_request(given, config)


def test_what_cannot_be_generated_is_no_stop_token_and_no_bad_word():
    """vLLM would look for their logits."""
    given = request([WORD])
    params = given.sampling_params
    assert params is not None
    params.update_from_generation_config({"eos_token_id": [3, NUM_ROWS]}, NUM_ROWS + 9)
    params._bad_words_token_ids = [[7, NUM_ROWS], [7], [NUM_ROWS]]
    validate_engine_request(given, MODEL_CONFIG)
    assert params.all_stop_token_ids == {3}
    assert params.bad_words_token_ids == [[7]]


@given(
    tokens=st.lists(st.sampled_from([IMAGE, WORD, 0]), min_size=1, max_size=30),
    covered=st.lists(st.tuples(st.integers(0, 29), st.integers(1, 8)), max_size=3),
)
def test_a_request_is_refused_exactly_when_a_token_is_uncovered(
    tokens: list[int], covered: list[tuple[int, int]]
):
    inside = {i for offset, length in covered for i in range(offset, offset + length)}
    stray = [i for i, token in enumerate(tokens) if token == IMAGE and i not in inside]
    if not stray:
        validate_engine_request(request(tokens, *covered), MODEL_CONFIG)
        return
    refusal = sentence(tokens, *covered)
    assert f"has {len(stray)} image token(s)" in refusal
    assert f"the first at position {stray[0]}:" in refusal


def test_the_prompt_is_not_written_to():
    """It may be an array that vLLM goes on using."""
    tokens = np.array([IMAGE, WORD, IMAGE])
    validate_engine_request(request(tokens, (0, 1), (2, 1)), MODEL_CONFIG)
    assert tokens.tolist() == [IMAGE, WORD, IMAGE]

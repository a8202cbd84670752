# SPDX-License-Identifier: Apache-2.0
"""A request that the platform cannot serve is refused with a sentence, before it is scheduled."""

from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams

from tests.frontend.engine_requests import WORD, sentence
from vllm_spyre_mm.frontend.request_validation import validate_params


def test_streaming_input_is_refused():
    assert "streaming input is not supported" in sentence([WORD], resumable=True)


def test_a_prompt_of_embeddings_is_refused():
    refusal = sentence(None, prompt_embeds=torch.zeros(2, 4))
    assert "a prompt given as embeddings is not supported" in refusal


def test_pooling_is_refused():
    with pytest.raises(VLLMValidationError, match="pooling requests are not supported"):
        validate_params(PoolingParams())


@pytest.mark.parametrize(
    "asked",
    [{"prompt_logprobs": 0}, {"prompt_logprobs": 3}, {"prompt_logprob_token_ids": [1, 2]}],
    ids=str,
)
def test_prompt_logprobs_are_refused_by_their_name(asked: dict[str, Any]):
    """Zero asks for them too: the prompt's own tokens."""
    with pytest.raises(VLLMValidationError, match="prompt_logprobs is not supported") as error:
        validate_params(SamplingParams(**asked))
    assert error.value.parameter == "prompt_logprobs"


@pytest.mark.parametrize(
    "asked",
    [{}, {"logprobs": 5}, {"n": 2, "seed": 1}, {"stop": ["."], "temperature": 0.0}],
    ids=str,
)
def test_other_sampling_parameters_are_accepted(asked: dict[str, Any]):
    validate_params(SamplingParams(**asked))


@pytest.mark.parametrize("asked", [{"top_k": 2**64}, {"stop": ["\ud83d"]}], ids=["number", "text"])
def test_sampling_parameters_that_cannot_be_sent_are_refused(asked: dict[str, Any]):
    """vLLM finds out when it sends them, and answers HTTP 500."""
    with pytest.raises(VLLMValidationError, match="cannot be sent to the engine"):
        validate_params(SamplingParams(**asked))


def test_sampling_parameters_may_hold_objects_where_nothing_is_sent():
    validate_params(SamplingParams(extra_args={"mine": object()}))

# SPDX-License-Identifier: Apache-2.0
"""Sampling is vLLM's: each kind of it works for prompts that are prefilled in chunks."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, CompletionOutput, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from tests.e2e.asks import parity_asks
from tests.e2e.engines import Ask, engine, greedy
from tests.reference import Reference

ASKS = tuple(parity_asks(9, seed=7))


@pytest.fixture(scope="module")
def llm(llava_next_checkpoint: Path) -> Iterator[LLM]:
    """A random model: its distribution is flat enough for sampling to show."""
    with engine(
        llava_next_checkpoint,
        max_num_batched_tokens=128,
        max_model_len=1024,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    ) as llm:
        yield llm


def sample(llm: LLM, asks: Sequence[Ask], **parameters: Any) -> list[CompletionOutput]:
    parameters = {"max_tokens": 12, "ignore_eos": True, **parameters}
    outputs = llm.generate(
        [ask.prompt for ask in asks], SamplingParams(**parameters), use_tqdm=False
    )
    return [output.outputs[0] for output in outputs]


def tokens(completions: Sequence[CompletionOutput]) -> list[tuple[int, ...]]:
    return [tuple(completion.token_ids) for completion in completions]


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(llm: LLM) -> None:
    """With chunked prefill too, where vLLM's CPU backend fails for seeded requests."""
    together = tokens(sample(llm, ASKS, temperature=1.0, seed=5))
    alone = [tokens(sample(llm, [ask], temperature=1.0, seed=5))[0] for ask in ASKS]
    assert together == alone
    assert together != tokens(sample(llm, ASKS, temperature=1.0, seed=6))


def test_top_k_of_one_is_greedy(llm: LLM) -> None:
    expected = tokens(sample(llm, ASKS, temperature=0.0))
    assert tokens(sample(llm, ASKS, temperature=2.0, top_k=1)) == expected
    assert tokens(sample(llm, ASKS, temperature=2.0, top_p=1e-6)) == expected
    assert tokens(sample(llm, ASKS, temperature=2.0)) != expected


def test_first_token_frequencies_follow_the_logits(
    llm: LLM, llava_next_reference: Reference
) -> None:
    """2,000 draws of a first token against the softmax of the reference's logits."""
    ask, temperature = ASKS[1], 2.0
    output = llm.generate(
        [ask.prompt],
        SamplingParams(temperature=temperature, n=2000, max_tokens=1, seed=0),
        use_tqdm=False,
    )[0]
    logits = llava_next_reference.logits(ask.text, list(ask.images))
    likely = torch.softmax(logits / temperature, dim=0).topk(5)
    drawn = torch.tensor([completion.token_ids[0] for completion in output.outputs])
    for token, probability in zip(likely.indices, likely.values, strict=True):
        frequency = float((drawn == token).float().mean())
        # Four standard deviations of a binomial frequency.
        assert (
            abs(frequency - probability) < 4 * float(probability * (1 - probability) / 2000) ** 0.5
        )


def test_each_penalty_makes_answers_repeat_less(llm: LLM) -> None:
    def distinct(**penalty: float) -> int:
        completions = sample(llm, ASKS, temperature=0.0, max_tokens=40, **penalty)
        return sum(len(set(completion.token_ids)) for completion in completions)

    plain = distinct()
    assert distinct(presence_penalty=2.0) > plain
    assert distinct(frequency_penalty=2.0) > plain
    assert distinct(repetition_penalty=2.0) > plain


def test_logit_bias_bad_words_and_allowed_tokens(llm: LLM) -> None:
    for completion in sample(llm, ASKS, temperature=0.0, logit_bias={300: 100.0}):
        assert set(completion.token_ids) == {300}
    for completion in sample(llm, ASKS, temperature=1.0, allowed_token_ids=[65, 66, 67]):
        assert set(completion.token_ids) <= {65, 66, 67}


def test_minimum_length_withholds_the_end(llm: LLM) -> None:
    end = llm.get_tokenizer().eos_token_id
    completions = sample(
        llm, ASKS, temperature=0.0, ignore_eos=False, min_tokens=7, logit_bias={end: 100.0}
    )
    assert {len(completion.token_ids) for completion in completions} == {8}


def test_logprobs_equal_transformers(llm: LLM, llava_next_reference: Reference) -> None:
    for ask, completion in zip(ASKS, sample(llm, ASKS, temperature=0.0, logprobs=5), strict=True):
        logits = llava_next_reference.logits(ask.text, list(ask.images))
        expected = torch.log_softmax(logits, dim=0)
        for token, logprob in completion.logprobs[0].items():
            assert logprob.logprob == pytest.approx(float(expected[token]), abs=1e-3)
        assert completion.logprobs[0][completion.token_ids[0]].rank == 1


def test_structured_outputs(llm: LLM) -> None:
    """Grammars hold from the first token on, in a batch with requests that have none."""
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "boolean"}},
        "required": ["colour", "count"],
    }
    structures = [
        StructuredOutputsParams(choice=["circle", "square"]),
        StructuredOutputsParams(regex="[ab]{3}-[0-9]{2}"),
        StructuredOutputsParams(json=schema),
        None,
    ]
    outputs = llm.generate(
        [ASKS[i].prompt for i in (1, 2, 4, 5)],
        [
            SamplingParams(temperature=1.0, seed=1, max_tokens=120, structured_outputs=structure)
            for structure in structures
        ],
        use_tqdm=False,
    )
    choice, regex, answer, free = (output.outputs[0].text for output in outputs)
    assert choice in ("circle", "square")
    assert re.fullmatch("[ab]{3}-[0-9]{2}", regex)
    assert json.loads(answer)["colour"] in ("red", "blue")
    assert free


def test_a_custom_logits_processor_is_honoured(llava_next_checkpoint: Path) -> None:
    arguments = {"logits_processors": ["tests.e2e.processors:OnlyOneToken"]}
    with engine(llava_next_checkpoint, max_num_batched_tokens=128, **arguments) as llm:
        for completion in sample(llm, ASKS[:3], temperature=0.0):
            assert set(completion.token_ids) == {123}


def test_prompt_logprobs_are_refused_and_the_next_request_works(llm: LLM) -> None:
    expected = tokens(sample(llm, ASKS[:1], temperature=0.0))
    with pytest.raises(VLLMValidationError, match="prompt_logprobs is not supported on Spyre"):
        sample(llm, ASKS[:1], prompt_logprobs=1)
    assert tokens(sample(llm, ASKS[:1], temperature=0.0)) == expected


def test_beams_begin_with_the_likeliest_tokens(llm: LLM, llava_next_reference: Reference) -> None:
    """And end with the likeliest sequence first."""
    ask = ASKS[1]
    likeliest = llava_next_reference.logits(ask.text, list(ask.images)).topk(3).indices.tolist()
    for length in (1, 4):
        parameters = BeamSearchParams(beam_width=3, max_tokens=length, ignore_eos=True)
        (output,) = llm.beam_search([ask.prompt], parameters)
        found = [sequence.tokens[-length:] for sequence in output.sequences]
        assert length > 1 or found == [[token] for token in likeliest]
        assert {each[0] for each in found} <= set(likeliest)
        scores = [sequence.cum_logprob for sequence in output.sequences]
        assert scores == sorted(scores, reverse=True)
        assert len(set(map(tuple, found))) == 3


def test_a_prompt_of_one_token(llm: LLM) -> None:
    (output,) = llm.generate([{"prompt_token_ids": [100]}], greedy(4), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4

# SPDX-License-Identifier: Apache-2.0
"""Tokens, logits and embeddings equal those of Transformers on the same checkpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from vllm import LLM, RequestOutput

from tests.e2e.asks import parity_asks
from tests.e2e.engines import Ask, engine, greedy, nothing_compiled, relative_error
from tests.reference import Reference

MAX_TOKENS = 16
FP32_BOUND = 1e-4
BF16_BOUND = 2e-2


@dataclass(frozen=True)
class Expected:
    """What Transformers makes of a request: greedy tokens, and features if it has pictures."""

    token_ids: list[int]
    features: torch.Tensor | None


def expect(reference: Reference, asks: Sequence[Ask]) -> list[Expected]:
    return [
        Expected(
            reference.generate(ask.text, list(ask.images), MAX_TOKENS),
            reference.features(ask.text, list(ask.images)) if ask.images else None,
        )
        for ask in asks
    ]


@pytest.fixture(scope="module")
def demo_asks() -> list[Ask]:
    return parity_asks(54)


@pytest.fixture(scope="module")
def demo_expected(demo_reference: Reference, demo_asks: list[Ask]) -> list[Expected]:
    return expect(demo_reference, demo_asks)


@pytest.fixture(scope="module")
def random_asks() -> list[Ask]:
    return parity_asks(24, seed=1)


@pytest.fixture(scope="module")
def random_expected(llava_next_reference: Reference, random_asks: list[Ask]) -> list[Expected]:
    return expect(llava_next_reference, random_asks)


def check(outputs: Sequence[RequestOutput], expected: Sequence[Expected], bound: float) -> None:
    for number, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        completion = output.outputs[0]
        assert list(completion.token_ids) == wanted.token_ids, f"request {number}"
        if wanted.features is None:
            assert completion.mm_embedding is None
        else:
            assert relative_error(completion.mm_embedding, wanted.features) < bound


def ask_all(llm: LLM, asks: Sequence[Ask]) -> list[RequestOutput]:
    return llm.generate([ask.prompt for ask in asks], greedy(MAX_TOKENS), use_tqdm=False)


def test_the_expected_answers_vary(
    demo_expected: list[Expected], random_expected: list[Expected]
) -> None:
    """Otherwise the comparisons below would prove little."""
    for expected in (demo_expected, random_expected):
        answers = {tuple(wanted.token_ids) for wanted in expected}
        assert len(answers) > len(expected) // 3
    assert sum(len(set(wanted.token_ids)) > 8 for wanted in random_expected) >= 8


class TestChunkedPrefill:
    """Chunks of two blocks, so that every prompt with a picture takes several."""

    @pytest.fixture(scope="class")
    def llm(self, demo_checkpoint: Path) -> Iterator[LLM]:
        with engine(demo_checkpoint, max_num_batched_tokens=128) as llm:
            yield llm

    def test_mixed_batch(
        self, llm: LLM, demo_asks: list[Ask], demo_expected: list[Expected]
    ) -> None:
        check(ask_all(llm, demo_asks), demo_expected, FP32_BOUND)

    def test_again_from_the_prefix_cache(
        self, llm: LLM, demo_asks: list[Ask], demo_expected: list[Expected]
    ) -> None:
        ask_all(llm, demo_asks)
        outputs = ask_all(llm, demo_asks)
        assert sum(output.num_cached_tokens > 0 for output in outputs) > len(outputs) // 3
        check(outputs, demo_expected, FP32_BOUND)

    def test_alone(self, llm: LLM, demo_asks: list[Ask], demo_expected: list[Expected]) -> None:
        llm.reset_prefix_cache()
        for ask, expected in list(zip(demo_asks, demo_expected, strict=True))[:9]:
            check(ask_all(llm, [ask]), [expected], FP32_BOUND)


def test_compiled_by_inductor_without_prefix_cache(
    demo_checkpoint: Path, demo_asks: list[Ask], demo_expected: list[Expected]
) -> None:
    """And warmup has made every graph: none is made while serving."""
    with (
        engine(
            demo_checkpoint,
            enforce_eager=False,
            enable_prefix_caching=False,
            max_num_batched_tokens=512,
        ) as llm,
        nothing_compiled(),
    ):
        check(ask_all(llm, demo_asks), demo_expected, FP32_BOUND)
        ask_all(llm, demo_asks[:1])
        llm.generate([{"prompt_token_ids": [100]}], greedy(4, logprobs=2), use_tqdm=False)


@pytest.mark.parametrize("chunk_size", [64, 256])
def test_one_feature_layer(
    llava_next_checkpoint: Path,
    random_asks: list[Ask],
    random_expected: list[Expected],
    chunk_size: int,
) -> None:
    with engine(llava_next_checkpoint, max_num_batched_tokens=chunk_size) as llm:
        check(ask_all(llm, random_asks), random_expected, FP32_BOUND)
        check(ask_all(llm, random_asks), random_expected, FP32_BOUND)


def test_bf16(demo_checkpoint: Path, demo_asks: list[Ask], demo_expected: list[Expected]) -> None:
    """Answers are equal, and features and first-token logits within 2e-2 of the largest."""
    reference = Reference(demo_checkpoint)
    with engine(
        demo_checkpoint, dtype="bfloat16", max_logprobs=-1, logprobs_mode="raw_logits"
    ) as llm:
        check(ask_all(llm, demo_asks), demo_expected, BF16_BOUND)
        few = demo_asks[:12]
        outputs = llm.generate([ask.prompt for ask in few], greedy(1, logprobs=-1), use_tqdm=False)
        for ask, output in zip(few, outputs, strict=True):
            by_token = output.outputs[0].logprobs[0]
            logits = torch.tensor([by_token[token].logprob for token in range(len(by_token))])
            assert relative_error(logits, reference.logits(ask.text, list(ask.images))) < BF16_BOUND

# SPDX-License-Identifier: Apache-2.0
"""What users get, compared with Transformers on each tier of CPUs: the default dtype, compiled.

The answers of the demo's trained checkpoint lead by far more than rounding to bf16 moves a logit:
tokens are equal to Transformers' in fp32 whatever the dtype. Features and logits are held to a
bound that is that of bf16 itself.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from vllm import LLM, RequestOutput

from tests.e2e.asks import parity_asks
from tests.e2e.engines import Ask, engine, greedy, relative_error
from tests.e2e.server_embeddings.requests import messages
from tests.e2e.serving import running_server
from tests.reference import Reference
from vllm_spyre_mm.config import CpuTier
from vllm_spyre_mm.payload import decode_mm_embedding

MAX_TOKENS = 16
BOUND = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
DEFAULTS: dict[str, Any] = {"dtype": "auto", "enforce_eager": False}

on_classes_of_cpus = pytest.mark.parametrize("tier", ["avx2", "avx512_bf16", "amx"], indirect=True)
"""What needs processes of its own is asked once with PyTorch's kernels and once with each unit."""


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    return parity_asks(18, seed=5)


@pytest.fixture(scope="module")
def references(demo_reference: Reference, asks: list[Ask]) -> list[tuple[list[int], Any]]:
    """Greedy tokens and features of each request."""
    return [
        (
            demo_reference.generate(ask.text, list(ask.images), MAX_TOKENS),
            demo_reference.features(ask.text, list(ask.images)) if ask.images else None,
        )
        for ask in asks
    ]


def test_the_answers_lead_by_far(demo_reference: Reference, asks: list[Ask]) -> None:
    """Otherwise equal tokens would be luck: bf16 moves a logit by less than a tenth of this."""
    certain = [
        demo_reference.certain_tokens(ask.text, list(ask.images), MAX_TOKENS, margin=0.5)
        for ask in asks
    ]
    assert sum(map(len, certain)) > 6 * len(asks)


@pytest.fixture
def llm(tier: CpuTier, demo_checkpoint: Path) -> Iterator[LLM]:
    """Chunks of two blocks, and too few blocks for all requests at once."""
    torch._dynamo.reset()
    with engine(
        demo_checkpoint,
        **DEFAULTS,
        max_model_len=1024,
        max_num_batched_tokens=128,
        num_gpu_blocks_override=24,
        disable_log_stats=False,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
    ) as llm:
        yield llm


def check(outputs: Sequence[RequestOutput], references: Sequence[tuple[list[int], Any]]) -> None:
    """That each output begins with the tokens of its reference, and has its features."""
    for output, (token_ids, features) in zip(outputs, references, strict=True):
        completion = output.outputs[0]
        assert list(completion.token_ids)[: len(token_ids)] == token_ids
        if features is None:
            assert completion.mm_embedding is None
        else:
            found = completion.mm_embedding
            assert relative_error(found, features) < BOUND[found.dtype]


def test_batches_chunks_preemption_prefix_hits_and_logits(
    tier: CpuTier,
    llm: LLM,
    asks: list[Ask],
    references: list[tuple[list[int], Any]],
    demo_reference: Reference,
) -> None:
    """Requests go on after the end of their answers, so that some lose their blocks meanwhile."""
    prompts = [ask.prompt for ask in asks]
    dtype = llm.llm_engine.model_config.dtype
    assert (dtype == torch.float32) == (tier in ("generic", "avx2"))
    check(llm.generate(prompts, greedy(150, ignore_eos=True), use_tqdm=False), references)
    counted = {metric.name: metric for metric in llm.get_metrics()}
    assert counted["vllm:num_preemptions"].value > 0
    for number in range(6):
        for hit in (False, True):
            outputs = llm.generate([prompts[number]], greedy(MAX_TOKENS), use_tqdm=False)
            check(outputs, [references[number]])
            long_enough = len(outputs[0].prompt_token_ids) > 64
            assert not hit or (outputs[0].num_cached_tokens > 0) == long_enough
    for ask, output in zip(
        asks[:3], llm.generate(prompts[:3], greedy(1, logprobs=-1), use_tqdm=False), strict=True
    ):
        by_token = output.outputs[0].logprobs[0]
        logits = torch.tensor([by_token[token].logprob for token in range(len(by_token))])
        expected = demo_reference.logits(ask.text, list(ask.images))
        assert relative_error(logits, expected) < BOUND[dtype]


@on_classes_of_cpus
@pytest.mark.usefixtures("tier")
def test_two_ranks_over_http(
    demo_checkpoint: Path, demo_reference: Reference, tmp_path: Path, asks: list[Ask]
) -> None:
    """Of a server that was given no dtype and no compiler's flag: answers, and features.

    One rank over HTTP with the defaults is in test_default_server.py.
    """
    asked = [ask for ask in asks if len(ask.images) == 1]
    two = ("--tensor-parallel-size", "2")
    with running_server(demo_checkpoint, tmp_path / "log.txt", *two, defaults=True) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        choices = [
            client.chat.completions.create(
                model="demo",
                messages=messages(*ask.images, question=ask.question),
                temperature=0,
                max_tokens=24,
                extra_body={"return_mm_embedding": True},
            ).choices[0]
            for ask in asked
        ]
    tokenizer = demo_reference.processor.tokenizer
    for ask, choice in zip(asked, choices, strict=True):
        tokens = demo_reference.generate(ask.text, list(ask.images), 24)
        assert choice.message.content == tokenizer.decode(tokens, skip_special_tokens=True)
        found = decode_mm_embedding(choice.mm_embedding)
        expected = demo_reference.features(ask.text, list(ask.images))
        assert relative_error(found, expected) < BOUND[found.dtype]

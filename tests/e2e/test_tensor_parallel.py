# SPDX-License-Identifier: Apache-2.0
"""Two ranks, a gloo process each, give the answers of one."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig
from vllm import LLM, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from tests import architectures, granite4_vision, idefics3, qwen_vl
from tests.e2e.asks import parity_asks
from tests.e2e.engines import assert_as_transformers, engine, greedy
from tests.reference import Reference


class Broken:
    """Extends a worker by what breaks it."""

    rank: int
    model_runner: Any

    def seed_apart(self) -> None:
        """What it draws at random is its rank's own from here on."""
        torch.manual_seed(1000 + self.rank)

    def break_sampler(self, log: str) -> None:
        """It raises, and what is printed from here on is in a file."""
        with open(log, "ab") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)

        def fail(*_: Any, **__: Any) -> Any:
            raise ArithmeticError("no dice")

        self.model_runner.sampler = fail


@pytest.fixture(scope="module")
def llm(llava_next_checkpoint: Path) -> Iterator[LLM]:
    with engine(
        llava_next_checkpoint,
        own_process=True,
        tensor_parallel_size=2,
        max_num_batched_tokens=128,
        worker_extension_cls=f"{Broken.__module__}.{Broken.__qualname__}",
    ) as llm:
        yield llm


def test_two_ranks_equal_transformers(llm: LLM, llava_next_reference: Reference) -> None:
    asks = parity_asks(6, seed=11)
    outputs = llm.generate([ask.prompt for ask in asks], greedy(12), use_tqdm=False)
    assert_as_transformers(outputs, asks, llava_next_reference, 12)


def test_tokens_that_are_drawn_are_the_same_on_both_ranks(llm: LLM) -> None:
    """The log probability of each is that of a prompt which goes as far: each rank went on with
    the same token, or their halves of the sums would not belong together."""
    drawn = SamplingParams(temperature=1.0, max_tokens=8, logprobs=1, ignore_eos=True)
    llm.collective_rpc("seed_apart")
    asks = parity_asks(4, seed=5)
    outputs = llm.generate([ask.prompt for ask in asks if not ask.images], drawn)
    assert len(outputs) > 1
    for output in outputs:
        (answer,), prompt = output.outputs, output.prompt_token_ids
        prefixes = [[*prompt, *answer.token_ids[:end]] for end in range(8)]
        again = llm.generate(
            [{"prompt_token_ids": prefix} for prefix in prefixes],
            [
                greedy(1, logprobs=1, allowed_token_ids=[token], ignore_eos=True)
                for token in answer.token_ids
            ],
        )
        for token, drawn_with, forced in zip(answer.token_ids, answer.logprobs, again, strict=True):
            (known,) = forced.outputs[0].logprobs
            assert drawn_with[token].logprob == pytest.approx(known[token].logprob, abs=1e-3)


def test_a_sampler_that_raises_ends_both_ranks(llm: LLM, tmp_path: Path) -> None:
    """The second does not wait for tokens until it is killed. The engine's last test."""
    log = tmp_path / "log.txt"
    llm.collective_rpc("break_sampler", args=(str(log),))
    with pytest.raises(EngineDeadError):
        llm.generate("What is there?", greedy(2), use_tqdm=False)
    printed = log.read_text().splitlines()
    told = "FirstRankError: the first rank, which works for all, failed: ArithmeticError: no dice"
    assert any("Worker_TP0" in line and "no dice" in line for line in printed)
    assert any("Worker_TP1" in line and told in line for line in printed)


@pytest.mark.parametrize(
    "config",
    [
        architectures.mistral3(architectures.ministral3()),
        idefics3.idefics3(architectures.llama()),
        architectures.granite4(),
        granite4_vision.granite4_vision(**{"text_config.num_key_value_heads": 2}),
        architectures.qwen2(),
        architectures.qwen3(),
        qwen_vl.qwen2_5_vl(**{"text_config.num_key_value_heads": 2}),
    ],
    ids=lambda config: config.model_type,
)
def test_two_ranks_of_other_architectures(tmp_path: Path, config: PretrainedConfig) -> None:
    checkpoint = architectures.save_checkpoint(tmp_path, config)
    reference = Reference(checkpoint)
    tag = getattr(reference.processor, "image_token", None)
    if config.model_type in qwen_vl.MODEL_TYPES:
        tag = qwen_vl.IMAGE
    asks = [replace(ask, tag=tag or "") for ask in parity_asks(6, seed=3) if tag or not ask.images]
    with engine(checkpoint, tensor_parallel_size=2, max_num_batched_tokens=128) as llm:
        outputs = llm.generate([ask.prompt for ask in asks], greedy(8), use_tqdm=False)
    for ask, output in zip(asks, outputs, strict=True):
        expected = reference.generate(ask.text, list(ask.images), 8)
        assert list(output.outputs[0].token_ids) == expected


def test_a_size_that_does_not_divide_the_kv_heads_is_refused(llava_next_checkpoint: Path) -> None:
    with (
        pytest.raises(
            ValueError, match="tensor_parallel_size=4 does not divide the model's 2 KV heads"
        ),
        engine(llava_next_checkpoint, own_process=True, tensor_parallel_size=4),
    ):
        pass

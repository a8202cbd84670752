# SPDX-License-Identifier: Apache-2.0
"""``load_format=dummy``: engines without any file of weights."""

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig
from vllm.outputs import RequestOutput

from tests import architectures
from tests.checkpoints import copy_processor, llava_next_config
from tests.e2e.asks import parity_asks
from tests.e2e.engines import engine, greedy

CONFIGS: dict[str, PretrainedConfig] = {
    "text": architectures.qwen3(tie_word_embeddings=True),
    "vision": llava_next_config(),
}


@pytest.fixture(params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What describes a model, and makes its inputs; no weights."""
    architectures.save_checkpoint(tmp_path, CONFIGS[request.param])
    if request.param == "vision":
        copy_processor(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    return tmp_path


def answers(folder: Path, **arguments: Any) -> list[RequestOutput]:
    """Eight tokens for each of three requests; with pictures, if the model takes any."""
    sees = (folder / "preprocessor_config.json").exists() or (
        folder / "processor_config.json"
    ).exists()
    asks = [ask for ask in parity_asks(6 if sees else 9) if sees or not ask.images][:3]
    with engine(folder, load_format="dummy", max_num_batched_tokens=128, **arguments) as llm:
        parameters = greedy(8, logprobs=1, ignore_eos=True)
        return llm.generate([ask.prompt for ask in asks], parameters, use_tqdm=False)


def assert_finite(outputs: list[RequestOutput]) -> None:
    """Each token is drawn from a distribution, and each picture has features."""
    for output in outputs:
        (answer,) = output.outputs
        assert len(answer.token_ids) == 8
        for token, known in zip(answer.token_ids, answer.logprobs, strict=True):
            assert math.isfinite(known[token].logprob)
        if answer.mm_embedding is not None:
            assert answer.mm_embedding.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_of_random_weights_are_finite(folder: Path, dtype: str) -> None:
    outputs = answers(folder, dtype=dtype, enforce_eager=dtype == "float32")
    assert_finite(outputs)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > 1


def test_two_ranks_have_parts_of_the_same_weights(folder: Path) -> None:
    alone = answers(folder)
    together = answers(folder, tensor_parallel_size=2)
    for one, two in zip(alone, together, strict=True):
        assert one.outputs[0].token_ids == two.outputs[0].token_ids
    other = answers(folder, seed=1)
    assert any(
        one.outputs[0].token_ids != another.outputs[0].token_ids
        for one, another in zip(alone, other, strict=True)
    )

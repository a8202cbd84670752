# SPDX-License-Identifier: Apache-2.0
"""Two ranks, a gloo process each, give the answers of one."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PretrainedConfig

from tests import architectures
from tests.e2e.asks import parity_asks
from tests.e2e.engines import engine, greedy, relative_error
from tests.reference import Reference


def test_two_ranks_equal_transformers(
    llava_next_checkpoint: Path, llava_next_reference: Reference
) -> None:
    asks = parity_asks(6, seed=11)
    with engine(
        llava_next_checkpoint,
        own_process=True,
        tensor_parallel_size=2,
        max_num_batched_tokens=128,
    ) as llm:
        outputs = llm.generate([ask.prompt for ask in asks], greedy(12), use_tqdm=False)
    for ask, output in zip(asks, outputs, strict=True):
        images = list(ask.images)
        assert list(output.outputs[0].token_ids) == llava_next_reference.generate(
            ask.text, images, 12
        )
        embedding = output.outputs[0].mm_embedding
        assert (embedding is None) == (not images)
        if images:
            assert relative_error(embedding, llava_next_reference.features(ask.text, images)) < 1e-4


@pytest.mark.parametrize(
    "config",
    [architectures.mistral3(architectures.ministral3()), architectures.qwen3()],
    ids=lambda config: config.model_type,
)
def test_two_ranks_of_other_architectures(tmp_path: Path, config: PretrainedConfig) -> None:
    checkpoint = architectures.save_checkpoint(tmp_path, config)
    reference = Reference(checkpoint)
    tag = getattr(reference.processor, "image_token", None)
    asks = [replace(ask, tag=tag or "") for ask in parity_asks(6, seed=3) if tag or not ask.images]
    with engine(
        checkpoint, own_process=True, tensor_parallel_size=2, max_num_batched_tokens=128
    ) as llm:
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

# SPDX-License-Identifier: Apache-2.0
"""Everything is compiled in the warmup: what comes after finds its graph."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters
from vllm import LLM, SamplingParams

from tests.e2e.engines import engine
from vllm_spyre_mm.model_executor.cpu.kernels.kernel import compile_kernel

MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_IMAGES = 1024, 4, 3
NUM_REQUESTS = 300
SIZES = ((96, 96), (17, 23), (400, 90), (40, 160), (250, 200), (96, 48), (240, 48), (1, 1))


@pytest.fixture(scope="module")
def llm(demo_checkpoint: Path) -> Iterator[LLM]:
    """An engine that compiles, with limits that a sweep can reach."""
    torch._dynamo.reset()
    counters.clear()
    with engine(
        demo_checkpoint,
        enforce_eager=False,
        dtype="auto",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=128,
        limit_mm_per_prompt={"image": MAX_IMAGES},
    ) as llm:
        yield llm


def compiled() -> dict[str, Any]:
    """What the compilers have made so far."""
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": dict(counters["graph_break"]),
        "frames": dict(counters["frames"]),
        "kernels": compile_kernel.cache_info().misses,
    }


def random_request(rng: random.Random) -> tuple[dict[str, Any], SamplingParams]:
    """Text alone, or with pictures; now and then as long as a request may be."""
    max_tokens = rng.choice((1, 1, 2, 5, 9))
    params = SamplingParams(
        temperature=rng.choice((0.0, 0.8)),
        seed=rng.choice((None, 7)),
        logprobs=rng.choice((None, None, 2)),
        max_tokens=max_tokens,
        ignore_eos=True,
    )
    longest = MAX_MODEL_LEN - max_tokens
    if rng.random() < 0.5:
        length = rng.choice((1, 2, 63, 64, 65, 127, 128, 129, longest, rng.randint(1, longest)))
        return {"prompt_token_ids": [rng.randrange(10, 500) for _ in range(length)]}, params
    count = rng.randint(1, MAX_IMAGES)
    sizes = rng.sample(SIZES, count)
    images = [Image.new("RGB", size, rng.choice(("red", "navy", "white"))) for size in sizes]
    text = "<image>\n" * count + "word " * rng.randint(0, 20)
    return {"prompt": text, "multi_modal_data": {"image": images}}, params


def test_a_sweep_of_requests_compiles_nothing(llm: LLM):
    before = compiled()
    # A block of the encoder, one of the decoder, and what vLLM traces for log probabilities.
    assert before["graphs"] == 3
    assert before["kernels"] > 0
    assert not before["breaks"]
    rng = random.Random(0)
    remaining = NUM_REQUESTS
    while remaining:
        batch = [random_request(rng) for _ in range(min(remaining, rng.randint(1, 8)))]
        prompts, params = zip(*batch, strict=True)
        outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
        for output, wanted in zip(outputs, params, strict=True):
            assert len(output.outputs[0].token_ids) == wanted.max_tokens
        remaining -= len(batch)
        assert compiled() == before

# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL as people who want vision features ask it: 40 streams at once over 4 pictures."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from vllm import RequestOutput, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from tests import architectures, qwen_vl
from tests.e2e.engines import relative_error
from tests.multimodal.mm_mappings.suite import picture
from tests.reference import Reference

PICTURES = [picture(*size) for size in ((200, 120), (120, 200), (180, 180), (250, 90))]
TEXT = f"<|im_start|>user\n{qwen_vl.IMAGE}What is it?<|im_end|>\n<|im_start|>assistant\n"
STREAMS = 40
FEWER = {"min_pixels": qwen_vl.LEAST_PIXELS, "max_pixels": qwen_vl.LEAST_PIXELS}
"""Bounds that let every picture have the fewest features."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.save_checkpoint(tmp_path_factory.mktemp("qwen3"), qwen_vl.qwen3_vl())


async def ask(llm: AsyncLLM, number: int) -> RequestOutput:
    """The last output of one stream; every third asks with bounds of its own."""
    prompt: dict[str, Any] = {
        "prompt": TEXT,
        "multi_modal_data": {"image": PICTURES[number % len(PICTURES)]},
    }
    if number % 3 == 2:
        prompt["mm_processor_kwargs"] = FEWER
    last = None
    async for output in llm.generate(
        prompt, SamplingParams(temperature=0.0, max_tokens=8), f"stream-{number}"
    ):
        last = output
    assert last is not None
    return last


async def all_streams(arguments: AsyncEngineArgs) -> list[RequestOutput]:
    llm = AsyncLLM.from_engine_args(arguments)
    try:
        return await asyncio.gather(*(ask(llm, number) for number in range(STREAMS)))
    finally:
        llm.shutdown()
        await asyncio.sleep(0)  # what shutdown cancelled ends here


def test_forty_streams_over_four_pictures(checkpoint: Path) -> None:
    arguments = AsyncEngineArgs(
        model=str(checkpoint),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=128,
        max_num_seqs=8,
        enable_return_mm_embedding=True,
        limit_mm_per_prompt={"image": 1},
        mm_processor_kwargs={"min_pixels": qwen_vl.LEAST_PIXELS, "max_pixels": 40_000},
        kv_cache_memory_bytes=64 << 20,
    )
    outputs = asyncio.run(all_streams(arguments))
    reference = Reference(checkpoint)
    firsts: dict[tuple[int, bool], torch.Tensor] = {}
    for number, output in enumerate(outputs):
        embedding, own_bounds = output.outputs[0].mm_embedding, number % 3 == 2
        assert embedding is not None
        first = firsts.setdefault((number % len(PICTURES), own_bounds), embedding)
        assert relative_error(embedding, first) < 1e-3
        if not own_bounds:
            image = PICTURES[number % len(PICTURES)]
            assert list(output.outputs[0].token_ids) == reference.generate(TEXT, [image], 8)
    fewest = {len(rows) for (_, own_bounds), rows in firsts.items() if own_bounds}
    most = {len(rows) for (_, own_bounds), rows in firsts.items() if not own_bounds}
    assert max(fewest) < min(most)
    means = [rows.mean(dim=0) for (_, own_bounds), rows in firsts.items() if not own_bounds]
    for number, mean in enumerate(means):
        for other in means[:number]:
            assert F.cosine_similarity(mean, other, dim=0) < 0.999

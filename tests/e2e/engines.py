# SPDX-License-Identifier: Apache-2.0
"""Engines for the end-to-end tests, and the requests they are asked."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm import LLM, RequestOutput, SamplingParams, envs
from vllm.v1.engine import core

from tests.reference import Reference


@contextlib.contextmanager
def engine(checkpoint: Path, *, own_process: bool = False, **arguments: Any) -> Iterator[LLM]:
    """An engine, ended afterwards.

    Args:
        checkpoint: folder of the model.
        own_process: run it as vLLM does by default. In the test's process it starts faster, and
            its parts can be looked at.
        arguments: of ``LLM``, over defaults for a small eager engine in fp32.
    """
    defaults: dict[str, Any] = {
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "limit_mm_per_prompt": {"image": 4},
        "enable_return_mm_embedding": True,
        "kv_cache_memory_bytes": 256 << 20,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1" if own_process else "0")
        # What the tests' process holds anyhow is frozen: see pytest_collection_finish.
        patch.setattr(core, "freeze_gc_heap", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        envs.disable_envs_cache()  # an engine that still runs in this process has filled it
        llm = LLM(model=str(checkpoint), **(defaults | arguments))
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """Asserts that the graphs of a compiled engine's warmup are all that there are afterwards."""
    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    yield
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        question: what the user says.
        images: pictures, in the order of their tags.
        tag: stands for a picture in the prompt.
    """

    question: str
    images: tuple[Image.Image, ...] = ()
    tag: str = "<image>"

    @property
    def text(self) -> str:
        """The prompt, with one tag for each picture."""
        tags = f"{self.tag}\n" * len(self.images)
        return f"<|user|>\n{tags}{self.question}\n<|assistant|>\n"

    @property
    def prompt(self) -> dict[str, Any]:
        """The prompt as ``LLM.generate`` takes it."""
        if not self.images:
            return {"prompt": self.text}
        return {"prompt": self.text, "multi_modal_data": {"image": list(self.images)}}


def greedy(max_tokens: int = 16, **parameters: Any) -> SamplingParams:
    """Sampling parameters of a greedy answer."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **parameters)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} != {tuple(expected.shape)}"
    return float((found.float() - expected.float()).abs().max() / expected.abs().max())


def assert_as_transformers(
    outputs: Sequence[RequestOutput], asks: Sequence[Ask], reference: Reference, max_tokens: int
) -> None:
    """Asserts that answers and embeddings are those of Transformers."""
    for ask, output in zip(asks, outputs, strict=True):
        images = list(ask.images)
        expected = reference.generate(ask.text, images, max_tokens)
        assert list(output.outputs[0].token_ids) == expected
        embedding = output.outputs[0].mm_embedding
        assert (embedding is None) == (not images)
        if images:
            assert relative_error(embedding, reference.features(ask.text, images)) < 1e-4

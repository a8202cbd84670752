# SPDX-License-Identifier: Apache-2.0
"""Encoding beside the steps, in real engines: the same answers, and faults of one request alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, RequestOutput

from tests.e2e.asks import parity_asks
from tests.e2e.engines import engine, greedy, relative_error
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.worker.model_runner import SpyreModelRunner

ASKS = parity_asks(9, seed=7)
SMALL: dict[str, Any] = {"max_num_batched_tokens": 256, "max_num_seqs": 4}


def generate(llm: LLM) -> list[RequestOutput]:
    return llm.generate([ask.prompt for ask in ASKS], greedy(12), use_tqdm=False)


@pytest.fixture(scope="module")
def encoded_inside(demo_checkpoint: Path) -> list[RequestOutput]:
    """Answers of an engine that encodes in the steps."""
    with engine(demo_checkpoint, additional_config={"encode_ahead": False}, **SMALL) as llm:
        return generate(llm)


@pytest.fixture(scope="module")
def llm(demo_checkpoint: Path, encoded_inside: list[RequestOutput]) -> Iterator[LLM]:
    with engine(demo_checkpoint, **SMALL) as llm:
        yield llm


def runner_of(llm: LLM) -> SpyreModelRunner:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def assert_same(output: RequestOutput, expected: RequestOutput) -> None:
    (found,), (wanted,) = output.outputs, expected.outputs
    assert list(found.token_ids) == list(wanted.token_ids)
    assert (found.mm_embedding is None) == (wanted.mm_embedding is None)
    if wanted.mm_embedding is not None:
        assert relative_error(found.mm_embedding, wanted.mm_embedding) < 1e-5


@pytest.fixture
def anew(llm: LLM) -> LLM:
    """The engine, with nothing of earlier requests in its caches."""
    llm.llm_engine.engine_core.reset_encoder_cache()
    assert llm.reset_prefix_cache()
    return llm


def test_answers_and_embeddings_are_the_same(
    anew: LLM, encoded_inside: list[RequestOutput]
) -> None:
    """And again, from the caches."""
    for _ in range(2):
        for output, expected in zip(generate(anew), encoded_inside, strict=True):
            assert_same(output, expected)


def test_nothing_is_encoded_inside_a_step(anew: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def inside(images: Any) -> Any:
        raise AssertionError("asked for in a step")

    monkeypatch.setattr(runner_of(anew), "encode", inside)
    assert all(output.outputs[0].finish_reason != "error" for output in generate(anew))


@pytest.mark.parametrize("fault", ["raises", "NaN"])
def test_a_picture_that_cannot_be_encoded_fails_its_request_alone(
    anew: LLM, encoded_inside: list[RequestOutput], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Although pictures of several requests go through the encoder together."""
    model, faulty = runner_of(anew).spyre_model, 4
    original = model.encode_pieces
    sizes: list[list[int]] = []

    def pieces(mm_kwargs: Any) -> Pieces[list[torch.Tensor]]:
        sizes.append(mm_kwargs["image_sizes"].tolist())
        features = yield from original(mm_kwargs)
        size = [*reversed(ASKS[faulty].images[0].size)]
        hit = [i for i, each in enumerate(sizes[-1]) if each == size]
        if hit and fault == "raises":
            raise MemoryError("no")
        return [each * float("nan") if i in hit else each for i, each in enumerate(features)]

    monkeypatch.setattr(model, "encode_pieces", pieces)
    size = ASKS[faulty].images[0].size
    affected = {i for i, ask in enumerate(ASKS) if any(each.size == size for each in ask.images)}
    assert faulty in affected
    assert len(affected) < len(ASKS) / 2
    for i, (output, expected) in enumerate(zip(generate(anew), encoded_inside, strict=True)):
        if i not in affected:
            assert_same(output, expected)
            continue
        (found,) = output.outputs
        assert found.finish_reason == "error"
        said = "could not be encoded: MemoryError: no" if fault == "raises" else "with NaN"
        assert said in str(found.stop_reason)
        assert str(found.stop_reason).startswith("image")
    assert max(map(len, sizes)) > 1
    monkeypatch.undo()
    for output, expected in zip(generate(anew), encoded_inside, strict=True):
        assert_same(output, expected)

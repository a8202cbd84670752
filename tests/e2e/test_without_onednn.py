# SPDX-License-Identifier: Apache-2.0
"""An engine on a host whose PyTorch was built without oneDNN, as on IBM Z, answers the same."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm import LLM

from tests.e2e.asks import parity_asks
from tests.e2e.engines import engine, greedy, relative_error
from tests.reference import Reference
from vllm_spyre_mm.model_executor.cpu import linear

MAX_TOKENS = 12


@pytest.fixture
def without_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulated: PyTorch says so, no operator of ``mkldnn`` is there, and none is used inside."""
    monkeypatch.setattr(linear, "computes_in_bf16", lambda: True)  # or no weight would be packed
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def packed_weights(llm: LLM) -> int:
    """How many parameters of the model have a layout of oneDNN's."""
    model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    return sum(parameter.is_mkldnn for parameter in model.parameters())


def test_the_answers_are_the_same(
    without_onednn: None, demo_checkpoint: Path, demo_reference: Reference
) -> None:
    asks = parity_asks(4, seed=5)
    with engine(demo_checkpoint, dtype="bfloat16") as llm:
        assert not packed_weights(llm)
        outputs = llm.generate([ask.prompt for ask in asks], greedy(MAX_TOKENS), use_tqdm=False)
    assert any(ask.images for ask in asks)
    for ask, output in zip(asks, outputs, strict=True):
        images = list(ask.images)
        (answer,) = output.outputs
        expected = demo_reference.generate(ask.text, images, MAX_TOKENS)
        assert list(answer.token_ids)[: len(expected)] == expected
        if images:
            features = demo_reference.features(ask.text, images)
            assert relative_error(answer.mm_embedding, features) < 2e-2


def test_weights_are_packed_where_it_is_there(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the simulation takes away."""
    monkeypatch.setattr(linear, "computes_in_bf16", lambda: True)
    with engine(demo_checkpoint, dtype="bfloat16") as llm:
        assert packed_weights(llm)

# SPDX-License-Identifier: Apache-2.0
"""An engine for the card that has lost one habit is found out, whichever it is."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.engines import engine, greedy
from vllm_spyre_mm.model_executor.backend import WarmupPass, WarmupWork
from vllm_spyre_mm.model_executor.card import backend, compile, inputs
from vllm_spyre_mm.model_executor.card.backend import CardBackend
from vllm_spyre_mm.model_executor.card.compile import CardDecoder, DecoderStep
from vllm_spyre_mm.model_executor.card.kv_blocks import CardCache

ENGINE: dict[str, Any] = {
    "dtype": "auto",
    "enforce_eager": False,
    "max_num_batched_tokens": 128,
    "max_model_len": 512,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 65 * (64 * 2 * 2 * 128 * 4 * 2),  # no multiple of the batch of blocks
}

Patch = Callable[[pytest.MonkeyPatch], None]


def no_options(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(compile, "OPTIONS", {})


def inference_mode(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CardBackend, "without_gradients", lambda _: torch.inference_mode())


def fp16_logits(patch: pytest.MonkeyPatch) -> None:
    def forward(self: DecoderStep, embeds: torch.Tensor, **inputs: Any) -> Any:
        return self.decoder(embeds, last_n_tokens=self.last_n_tokens, **inputs)

    patch.setattr(DecoderStep, "forward", forward)


def views(patch: pytest.MonkeyPatch) -> None:
    original = inputs.card_input

    def within_another(tensor: torch.Tensor, **marks: Any) -> torch.Tensor:
        copy = torch.stack([tensor, tensor])[1]
        return original(copy, **marks) if marks else copy

    patch.setattr(inputs, "card_input", within_another)


def kept_cache(patch: pytest.MonkeyPatch) -> None:
    original = CardBackend.forward

    def forward(self: CardBackend, step: Any, kv_cache: Any) -> Any:
        logits, _ = original(self, step, kv_cache)
        return logits, kv_cache

    patch.setattr(CardBackend, "forward", forward)


def host_in_warmup_mode(patch: pytest.MonkeyPatch) -> None:
    def passes(self: CardBackend, *_: Any) -> Iterator[WarmupPass]:
        yield WarmupPass("Compiling", WarmupWork.REQUESTS, self._run.compiling())

    patch.setattr(CardBackend, "warmup_passes", passes)


def any_number_of_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CardCache, "multiple", 1)


HABITS: dict[str, tuple[Patch, str]] = {
    "options": (no_options, "the options are None, not {'sendnn.dynamic': True}"),
    "no_grad": (inference_mode, "l_embeds_ was made in inference mode"),
    "fp32 logits": (fp16_logits, "the graph gives logits in torch.float16, not torch.float32"),
    "copies": (views, "l_inputs_current_tkv_mask_ is not contiguous at offset 0 of its storage"),
    "ghosts": (
        kept_cache,
        "a KV cache was handed over again that a step had returned another for",
    ),
    "blocks": (any_number_of_blocks, "blocks is no multiple of the batch of 4"),
    "a warmup of the host's own": (
        host_in_warmup_mode,
        "graphs of another compiler were made in warmup mode",
    ),
}
"""How each is lost, and what the stand-in says of it."""


def faults_with(
    checkpoint: Path, break_it: Patch, settings: dict[str, Any] | None = None
) -> set[str]:
    """What the stand-in says of an engine's start and of a request."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        break_it(patch)
        with engine(
            checkpoint, **ENGINE, additional_config={"encode_ahead": False} | (settings or {})
        ) as llm:
            record = sys.modules["torch_sendnn"].record
            llm.generate("Where is the red circle?", greedy(2), use_tqdm=False)
            faults = set(record.faults)
            record.faults.clear()
    return faults


@pytest.mark.parametrize("name", list(HABITS))
def test_a_lost_habit_is_found(card: None, demo_checkpoint: Path, name: str) -> None:
    break_it, expected = HABITS[name]
    faults = faults_with(demo_checkpoint, break_it)
    assert any(expected in fault for fault in faults), faults


def test_no_habit_is_lost(card: None, demo_checkpoint: Path) -> None:
    assert not faults_with(demo_checkpoint, lambda _: None)
    assert not sys.modules["torch_sendnn"].runtime.taken_signals()


def test_a_static_chunk_is_a_setting(card: None, demo_checkpoint: Path) -> None:
    """Which makes a graph that is not known to have been compiled for a card."""
    assert faults_with(demo_checkpoint, lambda _: None, {"card": {"dynamic_chunk": False}}) == {
        f"{name} of a chunk varies in dimensions (), not (1,)"
        for name in ("embeds", "position_ids", "slot_mapping")
    }


def test_signals_that_are_not_put_back_are_found(card: None, demo_checkpoint: Path) -> None:
    @contextlib.contextmanager
    def keep_nothing() -> Iterator[None]:
        yield

    def break_it(patch: pytest.MonkeyPatch) -> None:
        for module in (backend, compile):
            patch.setattr(module, "keep_signal_handlers", keep_nothing)

    faults_with(demo_checkpoint, break_it)
    assert sys.modules["torch_sendnn"].runtime.taken_signals()


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_graph_break_is_an_error_unless_it_is_allowed(
    card: None, demo_checkpoint: Path, fullgraph: bool
) -> None:
    def break_it(patch: pytest.MonkeyPatch) -> None:
        original = DecoderStep.forward

        def forward(self: DecoderStep, embeds: torch.Tensor, **inputs: Any) -> Any:
            torch._dynamo.graph_break()
            return original(self, embeds, **inputs)

        patch.setattr(DecoderStep, "forward", forward)

    settings = {"card": {"fullgraph": fullgraph}}
    if fullgraph:
        with pytest.raises(compile.CardError, match="could not compile or run a chunk"):
            faults_with(demo_checkpoint, break_it, settings)
    else:
        assert not faults_with(demo_checkpoint, break_it, settings)


def test_the_decoder_of_an_engine_is_the_compiled_one(card: None, demo_checkpoint: Path) -> None:
    torch._dynamo.reset()
    with engine(demo_checkpoint, **ENGINE) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        assert isinstance(worker.backend._run, CardDecoder)

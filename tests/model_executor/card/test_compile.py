# SPDX-License-Identifier: Apache-2.0
"""What the card gets, and what its runtime is kept from."""

import contextlib
import ctypes
import logging
import signal
import threading

import pytest
import torch
from torch import nn

from vllm_spyre_mm.model_executor.card.compile import (
    DecoderStep,
    card_input,
    keep_signal_handlers,
)

IGNORE = ctypes.c_void_p(1)  # SIG_IGN, as a runtime in C would install it


def ignore_in_c(number: int) -> None:
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(number, IGNORE)


def test_an_input_is_a_tensor_of_its_own() -> None:
    rows = torch.arange(12).view(3, 4)
    with torch.inference_mode():
        inferred = torch.arange(4)
    for tensor in (rows[1:], rows.T, rows[:, 2], rows[None], inferred):
        copy = card_input(tensor)
        assert torch.equal(copy, tensor)
        assert copy.is_contiguous()
        assert copy.storage_offset() == 0
        assert copy.untyped_storage().nbytes() == copy.nbytes
        assert copy._base is None
        assert not copy.is_inference()


def test_marks_are_those_of_the_copy() -> None:
    tensor = torch.zeros(2, 3, 4)
    copy = card_input(tensor, dynamic=(1,), static=(0, 2))
    assert copy._dynamo_dynamic_indices == {1}
    assert copy._dynamo_static_indices == {0, 2}
    assert not hasattr(tensor, "_dynamo_dynamic_indices")


def test_logits_are_fp32() -> None:
    class Decoder(nn.Module):
        def forward(
            self, embeds: torch.Tensor, *, last_n_tokens: int
        ) -> tuple[torch.Tensor, list[None]]:
            return embeds[:, -last_n_tokens:], []

    embeds = torch.full((1, 5, 2), 1 / 3, dtype=torch.float16)
    logits, _ = DecoderStep(Decoder(), 3)(embeds)
    assert torch.equal(logits, embeds[:, 2:].float())


def test_handlers_are_put_back() -> None:
    happened = []
    before = signal.signal(signal.SIGTERM, lambda *_: happened.append("handled"))
    try:
        with keep_signal_handlers():
            ignore_in_c(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert not happened
        signal.raise_signal(signal.SIGTERM)
        assert happened == ["handled"]
        with contextlib.suppress(KeyError), keep_signal_handlers():
            ignore_in_c(signal.SIGTERM)
            raise KeyError
        signal.raise_signal(signal.SIGTERM)
        assert happened == ["handled"] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_cannot_put_them_back_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)

    def work() -> None:
        with keep_signal_handlers():
            pass

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "not made in the main thread" in caplog.text

# SPDX-License-Identifier: Apache-2.0
"""A plugin of vLLM's whose vision encoder fails at pictures of certain colours.

With this folder on ``PYTHONPATH`` every process of vLLM loads it. A picture of one colour whose red
is one of :data:`FAULTS` has the encoder do that; every other picture is encoded as always.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Generator, Mapping
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

import torch

RAISES, NAN, OUT_OF_MEMORY, STALLS, STALLS_UNTIL_SIGTERM = FAULTS = range(1, 6)
STALLED = "the faulty encoder stalls in process"
"""Printed with the process's id before the encoder waits, for good or for SIGTERM."""
ENGINE_LEAVES = "FAULTY_ENGINE_LEAVES"
"""Variable of the environment: whether a server waits for the engine that it has told to end, as if
the machine did not let it go on to kill that before."""
FIRST_STALLS = "FAULTY_FIRST_STALLS"
"""Variable of the environment: whether the first pictures stall until SIGTERM; a warmup's are."""
SECONDS = 600


def register() -> None:
    """Wrap the encoder where it is loaded, or will be, and how a server ends its engine."""
    from vllm_spyre_mm.upstream.module_loading import when_loaded

    when_loaded("vllm_spyre_mm.multimodal.mm_mappings.llava_next", _make_faulty)
    if os.environ.get(ENGINE_LEAVES) and multiprocessing.parent_process() is None:
        BaseProcess.terminate = _terminate_and_wait  # type: ignore[method-assign]


def _terminate_and_wait(self: BaseProcess) -> None:
    assert self.pid is not None
    os.kill(self.pid, signal.SIGTERM)
    self.join(SECONDS)


def _make_faulty(module: ModuleType) -> None:
    mapping = module.LlavaNext  # type: ignore[attr-defined]
    original = mapping.feature_pieces

    def pieces(self: Any, model: Any, mm_kwargs: Mapping[str, Any]) -> Generator[None, None, Any]:
        faults = [_fault(picture) for picture in mm_kwargs["pixel_values"]]
        if RAISES in faults:
            raise ValueError("this picture is not to my taste")
        if OUT_OF_MEMORY in faults:
            torch.empty(1 << 60, dtype=torch.uint8)
        if STALLS in faults:
            print(STALLED, os.getpid(), flush=True)
            time.sleep(SECONDS)
        if STALLS_UNTIL_SIGTERM in faults or os.environ.pop(FIRST_STALLS, None):
            print(STALLED, os.getpid(), flush=True)
            _wait_for_sigterm()
        features: list[torch.Tensor] = yield from original(self, model, mm_kwargs)
        return [
            each * float("nan") if fault == NAN else each
            for fault, each in zip(faults, features, strict=True)
        ]

    mapping.feature_pieces = pieces


def _wait_for_sigterm() -> None:
    told = []
    handler: Any = signal.getsignal(signal.SIGTERM)

    def note(*details: Any) -> None:
        told.append(True)
        handler(*details)

    signal.signal(signal.SIGTERM, note)
    while not told:
        time.sleep(0.01)
    signal.signal(signal.SIGTERM, handler)


def _fault(pixel_values: torch.Tensor) -> int | None:
    """Which fault a picture stands for; ``(tiles, 3, height, width)``, normalised to [-1, 1]."""
    red = ((pixel_values[0, 0].float() + 1) * 127.5).round()
    shade = int(red[0, 0])
    return shade if shade in FAULTS and bool((red == shade).all()) else None

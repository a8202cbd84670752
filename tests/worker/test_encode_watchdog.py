# SPDX-License-Identifier: Apache-2.0
"""What watches the encoder of an engine on a CPU; tests/e2e/test_faults.py has a real one hang."""

import threading
import time
from collections.abc import Iterator

import pytest

from vllm_spyre_mm.model_executor.pieces import Pieces, whole
from vllm_spyre_mm.worker.encode_watchdog import EncodeWatchdog

SECONDS = 0.2


@pytest.fixture
def ended() -> threading.Event:
    return threading.Event()


@pytest.fixture
def watchdog(ended: threading.Event) -> Iterator[EncodeWatchdog]:
    watchdog = EncodeWatchdog(SECONDS, ended.set)
    watchdog.start()
    yield watchdog
    if not ended.is_set():  # the thread ends with this
        whole(watchdog.watch(layers(50 * SECONDS, ended)))
    watchdog.join()


def layers(seconds: float, ended: threading.Event) -> Pieces[str]:
    """Two of them; the second one ends early when the engine would have been ended."""
    yield
    ended.wait(seconds)
    yield
    return "features"


def test_a_layer_that_hangs_ends_the_engine(
    watchdog: EncodeWatchdog, ended: threading.Event
) -> None:
    started = time.monotonic()
    whole(watchdog.watch(layers(50 * SECONDS, ended)))
    assert ended.is_set()
    assert time.monotonic() - started >= SECONDS


def test_neither_do_many_layers_nor_pauses_between_them(
    watchdog: EncodeWatchdog, ended: threading.Event
) -> None:
    assert whole(watchdog.watch(layers(0.0, ended))) == "features"
    pieces = watchdog.watch(layers(0.0, ended))
    next(pieces)
    time.sleep(3 * SECONDS)
    assert not ended.is_set()


def test_what_is_raised_is_passed_on(watchdog: EncodeWatchdog, ended: threading.Event) -> None:
    def failing() -> Pieces[str]:
        yield
        raise MemoryError("no")

    with pytest.raises(MemoryError, match="no"):
        whole(watchdog.watch(failing()))
    time.sleep(3 * SECONDS)
    assert not ended.is_set()


def test_nothing_is_left_of_work_that_is_dropped(watchdog: EncodeWatchdog) -> None:
    closed = threading.Event()

    def work() -> Pieces[str]:
        try:
            yield
            yield
        finally:
            closed.set()
        return "features"

    pieces = watchdog.watch(work())
    next(pieces)
    pieces.close()
    assert closed.is_set()

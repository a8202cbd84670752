# SPDX-License-Identifier: Apache-2.0
"""Ends an engine whose vision encoder hangs on the cores of the engine itself.

Such an engine computes nothing any more, and looks alive. (Beside a card the encoder has a process
of its own, which is watched and replaced.)
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable

from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.model_executor.model import SpyreModel
from vllm_spyre_mm.model_executor.pieces import Pieces, Result

logger = get_logger(__name__)

CHECKS = 10
"""In the time that a piece may take."""


def end_process() -> None:
    """Write where each thread is, and end at once: the thread that hangs would do neither."""
    try:
        faulthandler.dump_traceback()
    finally:  # also where standard error is closed
        os._exit(1)


def watch_encoder(model: SpyreModel, seconds: float) -> None:
    """Have a model's encoder watched from now on, if it has one; see :class:`EncodeWatchdog`."""
    if model.part.has_encoder and model.mapping.modalities:
        watchdog = EncodeWatchdog(seconds)
        watchdog.start()
        model.watch = watchdog.watch


class EncodeWatchdog(threading.Thread):
    """Ends this process, with a sentence in the log, when a piece of encoding takes too long.

    Args:
        seconds: that a piece may take; a tenth of them later it is noticed at the latest.
        end: called then.
    """

    def __init__(self, seconds: float, end: Callable[[], object] = end_process) -> None:
        super().__init__(name="encode-watchdog", daemon=True)
        self._seconds, self._end = seconds, end
        self._deadline: float | None = None

    def watch(self, pieces: Pieces[Result]) -> Pieces[Result]:
        """The same work, watched while a piece of it is done."""
        with contextlib.closing(pieces):
            while True:
                self._deadline = time.monotonic() + self._seconds
                try:
                    next(pieces)
                except StopIteration as done:
                    result: Result = done.value
                    return result
                finally:
                    self._deadline = None
                yield

    def run(self) -> None:
        while (deadline := self._deadline) is None or time.monotonic() < deadline:
            time.sleep(self._seconds / CHECKS)
        logger.error(
            "The vision encoder did not end a layer within %g s (encode_timeout_seconds): the "
            "engine ends. Where each of its threads is:",
            self._seconds,
        )
        self._end()

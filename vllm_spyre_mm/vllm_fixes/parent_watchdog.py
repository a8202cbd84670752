# SPDX-License-Identifier: Apache-2.0
"""Ends a process of the engine when the one that started it is gone.

Leans on: the engine and its workers load vLLM's general plugins, are started by
vLLM's names for them, and leave in order at SIGTERM.

By itself the engine waits for requests for ever when its server is killed, and a worker whose
engine is killed goes on until its step ends; both keep their memory and their shared memory.
"""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.process import BaseProcess

from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.upstream.processes import is_engine_process
from vllm_spyre_mm.vllm_fixes.fault import Fault

logger = get_logger(__name__)

FAULT = Fault(
    "vLLM's engine and its workers go on, with their memory, when the process that started them "
    "is killed.",
    seen_in="0.32.0",
)
REPLACED = ()

GRACE_SECONDS = 5.0
"""For the step under way and for leaving in order."""


class ParentWatchdog(threading.Thread):
    """Ends this process when another one, which started it, is gone.

    Args:
        parent: the other process.
    """

    def __init__(self, parent: BaseProcess) -> None:
        super().__init__(name="parent-watchdog", daemon=True)
        self.parent = parent

    def run(self) -> None:
        self.parent.join()
        logger.warning("process %s, which started this one, is gone: it ends too", self.parent.pid)
        os.kill(os.getpid(), signal.SIGTERM)  # vLLM's handlers leave in order
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)


def install() -> None:
    """Watch the process that started this one, if this is one of an engine's; repeatable."""
    parent = multiprocessing.parent_process()
    if parent is None or not is_engine_process():
        return
    if not any(isinstance(thread, ParentWatchdog) for thread in threading.enumerate()):
        ParentWatchdog(parent).start()

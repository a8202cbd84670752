# SPDX-License-Identifier: Apache-2.0
"""A process of an engine ends when the one that started it is killed, and no other does."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest

from vllm_spyre_mm.vllm_fixes import parent_watchdog

FORK = multiprocessing.get_context("fork")  # nothing is imported again: these only wait


def child(pipe: Connection) -> None:
    """Load the plugin as vLLM does, tell who this is, and wait."""
    parent_watchdog.GRACE_SECONDS = 0.5
    # A thread of somebody else's, whatever it is called, is not taken for the watch.
    threading.Thread(target=time.sleep, args=(600,), name="parent-watchdog", daemon=True).start()
    parent_watchdog.install()
    parent_watchdog.install()
    signal.signal(signal.SIGTERM, lambda *_: pipe.send("told to end"))
    pipe.send(os.getpid())
    while True:
        time.sleep(0.05)


def parent(name: str, pipe: Connection) -> None:
    """Start the child under a name, and wait."""
    FORK.Process(target=child, args=(pipe,), name=name).start()
    time.sleep(600)


def start(name: str) -> tuple[BaseProcess, Connection]:
    """A parent whose child runs, and what the child says from then on."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=parent, args=(name, theirs))
    process.start()
    theirs.close()
    return process, ours


def test_what_happens_to_those_whose_parent_is_killed() -> None:
    """Processes of an engine are told to end and then killed; another one is left alone."""
    started = [start(name) for name in ("EngineCore_DP0", "VllmWorker-1", "Process-1")]
    pids = []
    for process, pipe in started:
        pids.append(pipe.recv())
        process.kill()
    *of_engines, (_, other) = started
    for _, pipe in of_engines:
        assert pipe.recv() == "told to end"
        with pytest.raises(EOFError):  # the child's end of the pipe is closed: it is gone
            pipe.recv()
    assert not other.poll(1)
    os.kill(pids[-1], signal.SIGKILL)
    with pytest.raises(EOFError):
        other.recv()

# SPDX-License-Identifier: Apache-2.0
"""A queue before a pretended process."""

import pytest

from tests.worker.encoder_process.pretended import BATCH_VALUES, TIMEOUT, Clock, Processes
from vllm_spyre_mm.worker.encoder_process import queue as module
from vllm_spyre_mm.worker.encoder_process.queue import ProcessEncodeQueue


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def processes(clock: Clock) -> Processes:
    return Processes(clock)


@pytest.fixture
def queue(processes: Processes) -> ProcessEncodeQueue:
    queue = ProcessEncodeQueue(BATCH_VALUES, TIMEOUT)
    queue.start(processes)
    return queue

# SPDX-License-Identifier: Apache-2.0
"""A pretended encoder's process, which does what a test says when it says so."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from vllm_spyre_mm.worker.encode_queue import EncodedImage
from vllm_spyre_mm.worker.encoder_process.parent import ProcessFault
from vllm_spyre_mm.worker.encoder_process.queue import ProcessEncodeQueue

BATCH_VALUES, TIMEOUT = 3000, 10.0


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Pretended:
    """A process that does what the test says."""

    clock: Clock
    ready: bool = True
    batches: deque[list[str]] = field(default_factory=deque)
    said: deque[EncodedImage | ProcessFault] = field(default_factory=deque)
    waits: int = 0
    pid: int = 0
    killed: bool = False
    cannot_be_sent: ProcessFault | None = None

    def __post_init__(self) -> None:
        self.last_heard = self.clock.now

    def send(self, pictures: list[MultiModalFeatureSpec]) -> None:
        if self.cannot_be_sent is not None:
            raise self.cannot_be_sent
        self.batches.append([picture.identifier for picture in pictures])

    def wait(self, seconds: float) -> None:
        self.waits += 1

    def receive(self) -> Iterator[EncodedImage]:
        while self.said:
            each = self.said.popleft()
            if isinstance(each, ProcessFault):
                raise each
            self.last_heard = self.clock.now
            yield each

    def kill(self) -> None:
        self.killed = True

    def encode(self, count: int = 1) -> None:
        """Finish batches."""
        for _ in range(count):
            for name in self.batches.popleft():
                self.said.append(EncodedImage(name, torch.zeros(1, 1)))


class Processes:
    """Starts processes; the last one is :attr:`present`."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.started = clock, 0
        self.become_ready = True
        self.first_says: ProcessFault | None = None
        self.refusals: deque[ProcessFault] = deque()

    def __call__(self) -> Any:
        if self.refusals:
            raise self.refusals.popleft()
        self.started += 1
        self.present = Pretended(self.clock, ready=self.become_ready)
        if self.first_says is not None:
            self.present.said.append(self.first_says)
        return self.present


def pictures(names: Iterable[str], values: int) -> list[MultiModalFeatureSpec]:
    pixels = MultiModalFieldElem(data=torch.zeros(values), field=MultiModalBatchedField())
    return [
        MultiModalFeatureSpec(
            data=MultiModalKwargsItem({"pixel_values": pixels}),
            modality="image",
            identifier=name,
            mm_position=PlaceholderRange(0, 1),
        )
        for name in names
    ]


def advance(queue: ProcessEncodeQueue) -> list[str]:
    """Names of pictures that are ready, those that failed with their reason."""
    return [
        each.identifier + (f" {each.fault}" if each.fault else "")
        for each in queue.advance(idle=False)
    ]


def ask(queue: ProcessEncodeQueue, names: str, values: int = 100) -> None:
    """Ask for pictures in a step in which none becomes ready."""
    queue.submit(pictures(names, values))
    assert advance(queue) == []


def fault(name: str, reason: str) -> str:
    return f"{name} could not be encoded: the vision encoder's process {reason}"

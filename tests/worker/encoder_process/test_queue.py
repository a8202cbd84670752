# SPDX-License-Identifier: Apache-2.0
"""The queue before the encoder's process: batches, and what becomes of them when processes fail.

The process is pretended: what it does, and when, is the test's choice. The real one is in
``test_process.py`` and in ``tests/e2e/test_encoder_process.py``.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from vllm_spyre_mm.worker.encode_queue import EncodedImage
from vllm_spyre_mm.worker.encoder_process import queue as module
from vllm_spyre_mm.worker.encoder_process.parent import ProcessFault
from vllm_spyre_mm.worker.encoder_process.queue import (
    EncoderProcessError,
    ProcessEncodeQueue,
)

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


def test_pictures_of_several_requests_share_batches_and_keep_their_order(
    queue: ProcessEncodeQueue, processes: Processes
) -> None:
    ask(queue, "ab", BATCH_VALUES // 2)
    assert [*processes.present.batches] == [["a", "b"]]
    ask(queue, "c", 2 * BATCH_VALUES)
    ask(queue, "defg")
    assert [*processes.present.batches] == [["a", "b"], ["c"]], "two batches at a time"
    processes.present.encode()
    assert advance(queue) == ["a", "b"]
    assert [*processes.present.batches] == [["c"], ["d", "e", "f", "g"]]
    processes.present.encode(2)
    assert advance(queue) == ["c", "d", "e", "f", "g"]
    assert advance(queue) == []


def test_a_step_waits_for_the_process_only_if_it_has_nothing_else_to_do(
    queue: ProcessEncodeQueue, processes: Processes
) -> None:
    queue.advance(idle=True)
    assert processes.present.waits == 0, "nothing is encoded"
    ask(queue, "a")
    queue.advance(idle=False)
    assert processes.present.waits == 0
    queue.advance(idle=True)
    assert processes.present.waits == 1


def test_cancelled_pictures_are_not_encoded_or_not_returned(
    queue: ProcessEncodeQueue, processes: Processes
) -> None:
    ask(queue, "ab", BATCH_VALUES)
    ask(queue, "cd", BATCH_VALUES)
    queue.cancel(["a", "c", "never asked for"])
    processes.present.encode(2)
    assert advance(queue) == ["b"]
    assert [*processes.present.batches] == [["d"]]


def test_a_picture_that_is_asked_for_again_while_it_is_encoded_is_encoded_once(
    queue: ProcessEncodeQueue, processes: Processes
) -> None:
    ask(queue, "a")
    queue.cancel(["a"])
    ask(queue, "a")
    processes.present.encode()
    assert advance(queue) == ["a"]
    assert not processes.present.batches


def test_another_picture_of_the_same_identifier_is_encoded_itself(
    queue: ProcessEncodeQueue, processes: Processes
) -> None:
    """Identifiers may be a caller's own: what is on its way under one may be another picture."""
    ask(queue, "a", values=100)
    queue.cancel(["a"])
    ask(queue, "a", values=200)
    assert [*processes.present.batches] == [["a"], ["a"]]
    processes.present.encode()
    assert advance(queue) == [], "of the picture that was cancelled"
    processes.present.encode()
    assert advance(queue) == ["a"]


def test_of_two_pictures_of_one_identifier_both_can_be_cancelled(
    queue: ProcessEncodeQueue, processes: Processes
) -> None:
    ask(queue, "a", values=100)
    queue.cancel(["a"])
    ask(queue, "a", values=200)
    queue.cancel(["a"])
    processes.present.encode(2)
    assert advance(queue) == []


def test_a_picture_that_ends_the_process_fails_and_those_behind_it_do_not(
    queue: ProcessEncodeQueue, processes: Processes
) -> None:
    ask(queue, "abc", BATCH_VALUES)
    first = processes.present
    first.said.append(ProcessFault("ended with status 1"))
    assert advance(queue) == [fault("a", "ended with status 1")]
    assert first.killed
    assert processes.started == 2
    assert advance(queue) == []
    assert [*processes.present.batches] == [["b"], ["c"]]
    processes.present.encode(2)
    assert advance(queue) == ["b", "c"]


def test_of_a_batch_that_ends_the_process_only_the_guilty_picture_fails(
    queue: ProcessEncodeQueue, processes: Processes
) -> None:
    ask(queue, "abc")
    ask(queue, "de")
    processes.present.said.append(ProcessFault("ended with status 1"))
    assert advance(queue) == advance(queue) == []
    assert [*processes.present.batches] == [["a"], ["b"]]
    processes.present.encode()
    processes.present.said.append(ProcessFault("ended with status 2"))
    assert advance(queue) == ["a", fault("b", "ended with status 2")]
    assert advance(queue) == []
    assert [*processes.present.batches] == [["c"], ["d", "e"]]
    processes.present.encode(2)
    assert advance(queue) == ["c", "d", "e"]


def test_cancelled_pictures_are_not_tried_again(
    queue: ProcessEncodeQueue, processes: Processes
) -> None:
    """Those that were encoded together with them are: the cancelled one may be to blame."""
    ask(queue, "abc")
    queue.cancel(["a"])
    processes.present.said.append(ProcessFault("ended with status 1"))
    assert advance(queue) == advance(queue) == []
    assert [*processes.present.batches] == [["b"], ["c"]]
    processes.present.encode(2)
    assert advance(queue) == ["b", "c"]
    ask(queue, "a")
    processes.present.encode()
    assert advance(queue) == ["a"]


def test_a_picture_whose_partner_was_cancelled_is_tried_again(
    queue: ProcessEncodeQueue, processes: Processes, clock: Clock
) -> None:
    ask(queue, "ab")
    queue.cancel(["a"])
    clock.now += TIMEOUT + 1
    assert advance(queue) == advance(queue) == []
    assert [*processes.present.batches] == [["b"]]
    clock.now += TIMEOUT + 1
    assert advance(queue) == [
        fault("b", "did not encode a batch within 10 s (encode_timeout_seconds)")
    ]


def test_a_process_that_hangs_at_a_picture_that_nobody_wants_is_replaced(
    queue: ProcessEncodeQueue, processes: Processes, clock: Clock
) -> None:
    ask(queue, "a")
    queue.cancel(["a"])
    clock.now += TIMEOUT + 1
    assert advance(queue) == []
    assert processes.started == 2
    assert not processes.present.batches


def test_a_process_that_says_nothing_while_it_encodes_is_replaced(
    queue: ProcessEncodeQueue, processes: Processes, clock: Clock
) -> None:
    clock.now += 10 * TIMEOUT
    ask(queue, "ab", BATCH_VALUES)
    assert advance(queue) == []
    clock.now += TIMEOUT
    processes.present.encode()
    assert advance(queue) == ["a"], "it was heard"
    clock.now += TIMEOUT
    assert advance(queue) == []
    clock.now += 1
    assert advance(queue) == [
        fault("b", "did not encode a batch within 10 s (encode_timeout_seconds)")
    ]
    assert processes.started == 2


def test_pictures_wait_for_the_next_process_to_be_ready(
    queue: ProcessEncodeQueue, processes: Processes
) -> None:
    processes.become_ready = False
    processes.present.said.append(ProcessFault("ended with status 1"))
    assert advance(queue) == []
    ask(queue, "a")
    assert not processes.present.batches
    processes.present.ready = True
    assert advance(queue) == []
    assert [*processes.present.batches] == [["a"]]


def test_processes_that_fail_again_and_again_before_they_are_ready_are_an_error(
    queue: ProcessEncodeQueue, processes: Processes, clock: Clock
) -> None:
    processes.present.said.append(ProcessFault("ended with status 1"))
    processes.become_ready = False
    advance(queue)
    for _ in range(2):
        processes.present.said.append(ProcessFault("ended with status 2"))
        assert advance(queue) == []
    clock.now += module.START_SECONDS + 1
    reason = "failed 3 times in a row before it was ready; the last one was not ready within 300 s"
    with pytest.raises(EncoderProcessError, match=f"^the vision encoder's process {reason}$"):
        advance(queue)
    assert processes.present.killed


def test_pictures_that_end_processes_never_end_the_engine(
    queue: ProcessEncodeQueue, processes: Processes
) -> None:
    for _ in range(10):
        ask(queue, "a")
        processes.present.said.append(ProcessFault("ended with status 1"))
        assert advance(queue) == [fault("a", "ended with status 1")]


def test_processes_that_the_system_refuses_are_asked_for_again_after_a_while(
    queue: ProcessEncodeQueue, processes: Processes, clock: Clock
) -> None:
    ask(queue, "ab", BATCH_VALUES)
    refusal = ProcessFault("could not be had or spoken to: [Errno 11] no")
    processes.refusals += [refusal, refusal]
    processes.present.said.append(ProcessFault("ended with status 1"))
    assert advance(queue) == [fault("a", "ended with status 1")]
    assert advance(queue) == []
    assert len(processes.refusals) == 1, "it is not asked at once"
    before = clock.now
    while processes.refusals:
        assert queue.advance(idle=True) == []
    assert clock.now >= before + module.REFUSED_SECONDS, "a step with nothing to do waits"
    clock.now += 2 * module.REFUSED_SECONDS
    assert advance(queue) == []
    assert [*processes.present.batches] == [["b"]]


def test_a_system_that_refuses_processes_again_and_again_is_an_error(
    queue: ProcessEncodeQueue, processes: Processes, clock: Clock
) -> None:
    processes.refusals += [ProcessFault("could not be had or spoken to: [Errno 11] no")] * 3
    processes.present.said.append(ProcessFault("ended with status 1"))
    for _ in range(2):
        assert advance(queue) == []
        clock.now += 2 * module.REFUSED_SECONDS
    reason = "failed 3 times in a row before it was ready; the last one could not be had .* no$"
    with pytest.raises(EncoderProcessError, match=f"^the vision encoder's process {reason}"):
        advance(queue)


def test_pictures_that_cannot_be_sent_are_to_blame_and_not_those_under_way(
    queue: ProcessEncodeQueue, processes: Processes
) -> None:
    ask(queue, "a", BATCH_VALUES)
    first = processes.present
    first.cannot_be_sent = ProcessFault("could not be had or spoken to: [Errno 24] no")
    queue.submit(pictures("b", BATCH_VALUES))
    assert advance(queue) == [fault("b", "could not be had or spoken to: [Errno 24] no")]
    assert first.killed
    assert advance(queue) == []
    assert [*processes.present.batches] == [["a"]]


def test_a_first_process_that_the_system_refuses_is_an_error(processes: Processes) -> None:
    queue = ProcessEncodeQueue(BATCH_VALUES, TIMEOUT)
    processes.refusals.append(ProcessFault("could not be had or spoken to: [Errno 11] no"))
    sentence = "^the vision encoder's process could not be had or spoken to: .*no$"
    with pytest.raises(EncoderProcessError, match=sentence):
        queue.start(processes)
    queue.close()


def test_a_start_waits_for_the_first_process_and_says_why_it_failed(processes: Processes) -> None:
    queue, processes.become_ready = ProcessEncodeQueue(BATCH_VALUES, TIMEOUT), False
    processes.first_says = ProcessFault("could not load the encoder: no")
    sentence = "^the vision encoder's process could not load the encoder: no$"
    with pytest.raises(EncoderProcessError, match=sentence):
        queue.start(processes)
    assert processes.present.killed
    assert processes.started == 1

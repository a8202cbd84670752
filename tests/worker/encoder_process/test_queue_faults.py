# SPDX-License-Identifier: Apache-2.0
"""What becomes of pictures when processes, which are pretended here, fail or are not to be had."""

import pytest

from tests.worker.encoder_process.pretended import (
    BATCH_VALUES,
    TIMEOUT,
    Clock,
    Processes,
    advance,
    ask,
    fault,
    pictures,
)
from vllm_spyre_mm.worker.encoder_process import queue as module
from vllm_spyre_mm.worker.encoder_process.parent import ProcessFault
from vllm_spyre_mm.worker.encoder_process.queue import (
    EncoderProcessError,
    ProcessEncodeQueue,
)


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

# SPDX-License-Identifier: Apache-2.0
"""The queue before the encoder's process: batches, and pictures that nobody wants any more.

The process is pretended: what it does, and when, is the test's choice. The real one is in
``test_process.py`` and in ``tests/e2e/test_encoder_process.py``.
"""

from tests.worker.encoder_process.pretended import BATCH_VALUES, Processes, advance, ask
from vllm_spyre_mm.worker.encoder_process.queue import ProcessEncodeQueue


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

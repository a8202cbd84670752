# SPDX-License-Identifier: Apache-2.0
"""The queue loses nothing, keeps the order of each kind, and lets the kinds take turns."""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request, RequestStatus

from tests.scheduler.simulation import make_request
from vllm_spyre_mm.scheduler.request_queue import AlternatingQueue


def requests(names: str) -> list[Request]:
    """One for each letter; capital letters have an image."""
    return [
        make_request(name, 8, images={name: (0, 4)} if name.isupper() else None) for name in names
    ]


def queue_of(names: str) -> AlternatingQueue:
    queue = AlternatingQueue()
    for request in requests(names):
        queue.add_request(request)
    return queue


def taken(queue: RequestQueue) -> str:
    names = []
    while queue:
        first = queue.peek_request()
        assert next(iter(queue)) is first
        assert queue.pop_request() is first
        names.append(first.request_id)
    return "".join(names)


def names_of(each: Iterable[Request]) -> str:
    return "".join(request.request_id for request in each)


@pytest.mark.parametrize(
    ("arrived", "order"),
    [
        ("abc", "abc"),
        ("ABC", "ABC"),
        ("ABCDEa", "aABCDE"),
        ("abcdA", "aAbcd"),
        ("aAbBcC", "aAbBcC"),
        ("ABabCDEFc", "aAbBcCDEF"),
    ],
)
def test_the_kinds_take_turns(arrived: str, order: str) -> None:
    assert names_of(queue_of(arrived)) == order
    assert taken(queue_of(arrived)) == order


def test_the_turn_is_kept_while_one_kind_is_missing() -> None:
    """Whoever was served last waits for the other kind, also when that comes later."""
    queue = queue_of("AB")
    assert queue.pop_request().request_id == "A"
    for request in requests("abC"):
        queue.add_request(request)
    assert taken(queue) == "aBbC"


def test_preempted_requests_come_first_and_take_no_turn() -> None:
    queue = queue_of("aA")
    for request in requests("zZ"):
        request.status = RequestStatus.PREEMPTED
        queue.prepend_request(request)
    assert names_of(queue) == "ZzaA"
    assert taken(queue) == "ZzaA"


def test_skipped_requests_come_back_where_they_were() -> None:
    """vLLM takes out those that wait for a grammar, and puts them back, the last one first."""
    queue = queue_of("abAB")
    order = names_of(queue)
    skipped = [queue.pop_request() for _ in range(4)]
    queue.prepend_requests(reversed(skipped))
    assert names_of(queue) == order


def test_those_that_are_not_ready_are_passed_over_and_come_last() -> None:
    queue = AlternatingQueue(lambda request: request.request_id not in "ACZ")
    for request in requests("xABCabc"):
        queue.add_request(request)
    assert queue.pop_request().request_id == "x"
    for request in requests("ZY"):
        request.status = RequestStatus.PREEMPTED
        queue.add_request(request)
    assert names_of(queue) == "YBabcZAC"
    assert taken(queue) == "YBabcZAC"


def test_who_waits_for_a_grammar_takes_no_turn() -> None:
    """vLLM takes it out to look at the next one: a text, since it is a text's turn still."""
    queue = queue_of("abcAB")
    blocked = queue.peek_request()
    blocked.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    assert names_of(queue) == "abAcB"
    assert queue.pop_request() is blocked
    assert queue.pop_request().request_id == "b"
    queue.prepend_request(blocked)
    assert names_of(queue) == "AacB"
    assert taken(queue) == "AacB"


def test_an_empty_queue() -> None:
    queue = AlternatingQueue()
    assert not queue
    assert not list(queue)
    for take in (queue.pop_request, queue.peek_request):
        with pytest.raises(IndexError):
            take()


def test_removing() -> None:
    queue = AlternatingQueue()
    every = requests("abAB")
    for request in every:
        queue.add_request(request)
    queue.remove_request(every[2])
    assert names_of(queue) == "aBb"
    queue.remove_requests([every[0], every[2]])
    assert (names_of(queue), len(queue)) == ("bB", 2)


@given(st.lists(st.sampled_from(["text", "image", "take"]), max_size=60))
@settings(deadline=None, derandomize=True)
def test_nobody_waits_for_more_of_the_other_kind_than_of_their_own(events: list[str]) -> None:
    """A request with k of its kind before it lets at most k + 1 of the other kind go first."""
    queue = AlternatingQueue()
    allowed: dict[str, int] = {}
    waiting = {"text": 0, "image": 0}
    for number, event in enumerate([*events, *["take"] * len(events)]):
        if event != "take":
            name = f"{event}-{number}"
            images = {name: (0, 4)} if event == "image" else None
            queue.add_request(make_request(name, 8, images=images))
            allowed[name] = waiting[event] + 1
            waiting[event] += 1
        elif queue:
            name = queue.pop_request().request_id
            kind = name.partition("-")[0]
            assert allowed.pop(name) >= 0
            waiting[kind] -= 1
            for other in allowed:
                allowed[other] -= not other.startswith(kind)
    assert not queue
    assert not allowed

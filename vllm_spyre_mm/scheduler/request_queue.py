# SPDX-License-Identifier: Apache-2.0
"""The order in which waiting requests are admitted: those with images and those without in turn.

With first come, first served alone, every short question would wait behind a few hundred requests
with images, each a prefill of many chunks.
"""

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from itertools import filterfalse

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request, RequestStatus

from vllm_spyre_mm.upstream.contract import require

_ADMISSIBLE = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


def next_candidates(
    ready: Iterable[Request], in_transit: Container[Request] = ()
) -> Iterator[Request]:
    """The waiting requests of which one may be admitted next.

    That is the first one and, while it waits for something else (its grammar), the ones after it:
    vLLM passes over such requests.

    Args:
        ready: those that are not passed over for their images, in the order in which they are
            taken.
        in_transit: those whose features, when they were last looked at, were on their way.
    """
    for request in ready:
        yield request
        if request.status in _ADMISSIBLE and request not in in_transit:
            return


class AlternatingQueue(RequestQueue):
    """Two queues, each first come, first served, that take turns while both have requests.

    For each request of its own kind before it, and for itself, a request waits for at most one of
    the other kind. Preempted requests come before all that have not run yet, as in vLLM's queue.
    One that is taken out and cannot be admitted, and is put back, takes no turn.

    Args:
        is_ready: whether a request may be admitted; those that are not are passed over while any
            is.
    """

    def __init__(self, is_ready: Callable[[Request], bool] = lambda _: True) -> None:
        self._is_ready = is_ready
        self._preempted: deque[Request] = deque()
        self._kinds: tuple[deque[Request], deque[Request]] = (deque(), deque())
        self._turn = 0

    @classmethod
    def check_base(cls) -> None:
        """Check that every abstract method of vLLM's queue is implemented here.

        Raises:
            UnsupportedVllmError: names what is missing.
        """
        missing = sorted(cls.__abstractmethods__)
        require(not missing, f"its queue of waiting requests has {', '.join(missing)} too")

    @property
    def _queues(self) -> tuple[deque[Request], ...]:
        return (self._preempted, *self._kinds)

    def _queue_of(self, request: Request) -> deque[Request]:
        if request.status == RequestStatus.PREEMPTED:
            return self._preempted
        return self._kinds[bool(request.mm_features)]

    def _next(self) -> tuple[deque[Request], Request]:
        """The next request, and the queue that it is in.

        Raises:
            IndexError: none waits.
        """
        turn, other = self._kinds[self._turn], self._kinds[1 - self._turn]
        in_order = (self._preempted, turn, other)
        for queue in in_order:
            for request in queue:
                if self._is_ready(request):
                    return queue, request
        queue = next(filter(None, in_order), turn)
        return queue, queue[0]

    def _turn_after(self, request: Request, turn: int) -> int:
        """Whose turn it is after a request is taken, given whose it is before."""
        if request.status == RequestStatus.WAITING and self._is_ready(request):
            return int(not request.mm_features)
        return turn

    def add_request(self, request: Request) -> None:
        """Put a request behind the others of its kind."""
        self._queue_of(request).append(request)

    def pop_request(self) -> Request:
        """Remove and return the next request; then it is the other kind's turn."""
        queue, request = self._next()
        self._turn = self._turn_after(request, self._turn)
        queue.remove(request)
        return request

    def peek_request(self) -> Request:
        """Return the next request without removing it."""
        return self._next()[1]

    def prepend_request(self, request: Request) -> None:
        """Put a request before the others of its kind, or a preempted one before all."""
        self._queue_of(request).appendleft(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Put requests in front one by one, so that the last of them comes first."""
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        """Remove a request that waits here."""
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Remove those of the requests that wait here."""
        removed = set(requests)
        for queue in self._queues:
            kept = [request for request in queue if request not in removed]
            queue.clear()
            queue.extend(kept)

    def with_images(self) -> Iterator[Request]:
        """The requests with images, in the order in which they would be taken."""
        yield from (request for request in self._preempted if request.mm_features)
        yield from self._kinds[True]

    def __bool__(self) -> bool:
        return any(self._queues)

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def __iter__(self) -> Iterator[Request]:
        """All requests, in the order in which they would be taken."""
        turn = self._turn
        for choose in (filter, filterfalse):
            preempted, *kinds = (choose(self._is_ready, queue) for queue in self._queues)
            yield from preempted
            upcoming = [next(kind, None) for kind in kinds]
            while any(request is not None for request in upcoming):
                kind = turn if upcoming[turn] is not None else 1 - turn
                request, upcoming[kind] = upcoming[kind], next(kinds[kind], None)
                assert request is not None, "one of the two is there"
                turn = self._turn_after(request, turn)
                yield request

# SPDX-License-Identifier: Apache-2.0
"""Has the images of waiting requests encoded ahead of time, beside the steps of running ones."""

import time
from collections.abc import Callable, Container, Iterable
from typing import TYPE_CHECKING

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.multimodal.given_features import given_features
from vllm_spyre_mm.scheduler.image_reservations import ImageReservations
from vllm_spyre_mm.scheduler.outputs import EncodingDone
from vllm_spyre_mm.scheduler.request_queue import AlternatingQueue

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler


class EncodeAhead:
    """Looks at the waiting requests in their order, as far as the encoder cache has room.

    Args:
        scheduler: whose requests they are.
        collects_from_start: whether a request wants the features of images that a prefix-cache hit
            covers, too.
        settings: with ``encode_ahead`` off every request is ready, and its images are encoded in
            its own steps; on a CPU encoding takes time of steps.

    Attributes:
        asked: request id and index of the images that were asked for on behalf of a request.
    """

    def __init__(
        self,
        scheduler: "Scheduler",
        collects_from_start: Callable[[Request], bool],
        settings: SpyreSettings,
    ) -> None:
        self._scheduler = scheduler
        self._collects_from_start, self._enabled = collects_from_start, settings.encode_ahead
        self._takes_steps = settings.backend != "sendnn"
        self._books = scheduler.encoder_cache_manager
        self._reservations = ImageReservations(self._books)
        self._starts: dict[str, int] = {}  # of waiting requests: the first token to compute
        self._ready: set[str] = set()
        self._missed: set[str] = set()  # of the ready ones: those that lack features after all
        self.asked: set[tuple[str, int]] = set()
        self._runs = 0
        self._after_chunk = self._owed = False  # of the last step that gave anybody a token

    @property
    def owes_a_piece(self) -> bool:
        """Whether a decode with a piece of encoding comes before the next chunk."""
        return self._owed and self._takes_steps and self._reservations.any_under_way

    def is_ready(self, request: Request) -> bool:
        """Whether a waiting request has its features, as of the last :meth:`look_ahead`."""
        return not self._enabled or not request.mm_features or request.request_id in self._ready

    def have_features(self, request: Request, start: int) -> bool:
        """Whether the features of a waiting request's tokens from ``start`` on are there.

        Otherwise they are asked for at the next :meth:`look_ahead`.
        """
        if not self._enabled:
            return True
        if self._collects_from_start(request):
            start = 0
        if self._reservations.is_complete(request, self._needed(request, start)):
            return True
        self._starts[request.request_id] = start
        self._missed.add(request.request_id)
        return False

    def look_ahead(self) -> None:
        """Reserve room for images of waiting requests and ask for those that are not encoded."""
        if not self._enabled:
            return
        waiting = list(self._waiting())
        self._reservations.settle(waiting)
        starts, ready = self._starts, self._ready - self._missed
        self._starts, self._ready, self._missed = {}, set(), set()
        if self._scheduler.pause_state != PauseState.UNPAUSED:
            return
        for request in waiting:
            req_id = request.request_id
            start = starts[req_id] if req_id in starts else self._find_start(request)
            self._starts[req_id] = start
            if req_id not in ready or req_id not in self._books.request_cached_ids:
                needed = self._needed(request, start)
                if not self._reserve(request, needed, self._starts):
                    break
                if not self._reservations.is_complete(request, needed):
                    continue
            self._ready.add(req_id)

    def instruct(self, output: SchedulerOutput, is_chunk: bool, decodes: bool) -> SchedulerOutput:
        """A step's message with what is to be encoded beside it, if there is anything.

        Args:
            output: the message.
            is_chunk: whether the step computes a chunk of a prompt.
            decodes: whether a running request waits for its next token.
        """
        may_encode = not decodes
        if not decodes or output.total_num_scheduled_tokens:  # otherwise a pause: nobody gets any
            may_encode |= not (is_chunk or self._after_chunk)
            self._owed = not (is_chunk or may_encode)
            self._after_chunk = is_chunk
        if self.asked:
            unfinished = self._scheduler.requests
            self.asked = {each for each in self.asked if each[0] in unfinished}
        return self._reservations.instruct(output, may_encode, self._waiting())

    def finish(self, done: Iterable[EncodingDone]) -> dict[str, str]:
        """Note images that are done; returns a sentence for each request that fails."""
        encoded, failed = self._reservations.finish(done, self._scheduler.requests)
        self._runs += sum(given_features(feature) is None for feature in encoded)
        return failed

    def take_runs(self) -> int:
        """Images that were encoded since the last call."""
        runs, self._runs = self._runs, 0
        return runs

    def forget_faulty(self) -> None:
        """Forget the images that could not be encoded, once the requests that failed are gone."""
        self._reservations.forget_faulty()

    def reset(self) -> None:
        """Ask anew for everything: vLLM has emptied the books.

        Prefills that are under way are preempted, so that nobody waits for their images but they.
        """
        self._reservations.reset()
        scheduler = self._scheduler
        running = scheduler.running if self._enabled else []
        for request in [each for each in running if each.is_prefill_chunk and each.mm_features]:
            scheduler.running.remove(request)
            scheduler._preempt_request(request, time.monotonic())

    def _waiting(self) -> Iterable[Request]:
        """Waiting requests with images, in the order in which they may be admitted."""
        waiting = self._scheduler.waiting
        if isinstance(waiting, AlternatingQueue):
            return waiting.with_images()
        return (request for request in waiting if request.mm_features)

    def _find_start(self, request: Request) -> int:
        """The first token of a waiting request whose features are needed."""
        if self._collects_from_start(request):
            return 0
        return self._scheduler._get_local_prefix_cache_hit(request)[1]

    def _needed(self, request: Request, start: int) -> list[int]:
        """Indices of the images whose placeholders reach behind ``start``.

        vLLM wants room for each of them, also where it has no feature there. An image whose
        identifier is known with another number of features is left to vLLM, which refuses the
        request.
        """
        needed = []
        for index, feature in enumerate(request.mm_features):
            end = feature.mm_position.offset + feature.mm_position.length
            size = request.get_num_encoder_embeds(index)
            if end > start and self._books.num_embeds_by_hash.get(feature.identifier, size) == size:
                needed.append(index)
        return needed

    def _reserve(self, request: Request, needed: list[int], before: Container[str]) -> bool:
        asked = self._reservations.reserve(request, needed, before)
        if asked is None:
            return False
        self.asked |= {(request.request_id, index) for index in asked}
        return True

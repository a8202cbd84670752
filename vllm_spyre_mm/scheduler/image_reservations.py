# SPDX-License-Identifier: Apache-2.0
"""Room in the encoder cache that is reserved ahead of time, and the images that are on their way.

vLLM's ``EncoderCacheManager`` keeps the books: a waiting request refers to its images there as soon
as room is reserved for them, as a running one does. Here is only what the books do not say: which
of those images are not encoded yet.
"""

from collections.abc import Container, Iterable, Mapping
from itertools import dropwhile
from typing import TYPE_CHECKING

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_spyre_mm.multimodal.item_names import named
from vllm_spyre_mm.multimodal.item_tensors import num_bytes
from vllm_spyre_mm.scheduler.failed_step import forget_image
from vllm_spyre_mm.scheduler.outputs import EncodingDone, SpyreSchedulerOutput

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

MAX_BYTES_AHEAD = 256 << 20
"""Pixels and the like of images that are asked for and not encoded yet; those of one request may be
more."""


class ImageReservations:
    """Reserves room for all images of a request or for none, and asks for those not encoded.

    Where room does not suffice, what later requests have reserved is given back, so that the first
    one gets in as soon as those that run leave room.

    Args:
        books: vLLM's.
    """

    def __init__(self, books: "EncoderCacheManager") -> None:
        self._books = books
        self._holders: dict[str, Request] = {}  # waiting requests for which room is reserved
        self._under_way: dict[str, MultiModalFeatureSpec] = {}  # asked for and not done
        self._to_encode: dict[str, MultiModalFeatureSpec] = {}
        self._to_cancel: list[str] = []
        self._faulty: list[str] = []

    @property
    def any_under_way(self) -> bool:
        """Whether images are asked for and not done."""
        return bool(self._under_way)

    def is_complete(self, request: Request, needed: list[int]) -> bool:
        """Whether a request refers to images, by their indices, and all of them are encoded."""
        held = self._books.get_cached_input_ids(request)
        return all(
            index in held and request.mm_features[index].identifier not in self._under_way
            for index in needed
        )

    def reserve(
        self, request: Request, needed: list[int], before: Container[str]
    ) -> list[int] | None:
        """Have a request refer to images, and ask for those that are not there.

        Args:
            request: the request.
            needed: indices of its images.
            before: ids of requests whose reservations are not given back for it.

        Returns:
            Indices of the images that are asked for on its behalf; None if there is no room, and
            nothing is reserved for this request.
        """
        held = self._books.get_cached_input_ids(request)
        missing = [index for index in needed if index not in held]
        if not missing:
            return []
        self._make_room(request, missing, before)
        if not self._fits(request, missing):
            return None
        self._holders[request.request_id] = request
        refer = self._books.check_and_update_cache
        absent = [index for index in missing if not refer(request, index)]
        # Of an image that is there twice the first place asks, and the second one refers to it.
        return [
            index for index in absent if not refer(request, index) and self._ask(request, index)
        ]

    def settle(self, waiting: Iterable[Request]) -> None:
        """Drop what is out of date: of requests that run, and images that nobody refers to.

        Args:
            waiting: all waiting requests with images, in their order.
        """
        held = self._holders.keys() & self._books.request_cached_ids.keys()
        self._holders = {
            request.request_id: request for request in waiting if request.request_id in held
        }
        self._withdraw()

    def reset(self) -> None:
        """Cancel everything: vLLM has emptied the books."""
        self._to_cancel += [each for each in self._under_way if each not in self._to_encode]
        self._to_encode.clear()
        self._under_way.clear()
        self._holders.clear()

    def instruct(
        self, output: SchedulerOutput, may_encode: bool, requests: Iterable[Request]
    ) -> SchedulerOutput:
        """A step's message with what is to be encoded beside it, if there is anything.

        Args:
            output: the message.
            may_encode: whether encoding may take time of the step.
            requests: the waiting ones, in their order.
        """
        self._withdraw()
        if self._to_encode:
            self._arrange(requests)
        if not (self._under_way or self._to_cancel):
            return output
        instructed = SpyreSchedulerOutput(
            **vars(output),
            cancelled_images=self._to_cancel,
            images_to_encode=list(self._to_encode.values()),
            may_encode=may_encode,
        )
        self._to_cancel, self._to_encode = [], {}
        return instructed

    def finish(
        self, done: Iterable[EncodingDone], requests: Mapping[str, Request]
    ) -> "tuple[list[MultiModalFeatureSpec], dict[str, str]]":
        """Note images that are done; those that were cancelled meanwhile are ignored.

        Args:
            done: the images.
            requests: all unfinished requests.

        Returns:
            The images that are encoded, and a sentence for each request that fails, by its id.
        """
        encoded: list[MultiModalFeatureSpec] = []
        failed: dict[str, str] = {}
        for image in done:
            feature = self._under_way.pop(image.identifier, None)
            if feature is None:
                continue
            if image.fault is None:
                encoded.append(feature)
                continue
            self._faulty.append(image.identifier)
            for req_id in self._books.cached.get(image.identifier, ()):
                items = {
                    index: feature
                    for index, feature in enumerate(requests[req_id].mm_features)
                    if feature.identifier == image.identifier
                }
                failed.setdefault(req_id, f"{named(items)} {image.fault}")
        return encoded, failed

    def forget_faulty(self) -> None:
        """Remove images that could not be encoded from the books, once their requests are gone."""
        for identifier in self._faulty:
            if identifier in self._books.freeable:
                forget_image(self._books, identifier)
        self._faulty.clear()

    # -- room ------------------------------------------------------------------------------------

    def _ask(self, request: Request, index: int) -> bool:
        feature = request.mm_features[index]
        fits = self._books.can_allocate(request, index, self._books.cache_size, 0)
        assert fits, "there is room for all of them"
        self._books.allocate(request, index)
        self._under_way[feature.identifier] = self._to_encode[feature.identifier] = feature
        return True

    def _arrange(self, requests: Iterable[Request]) -> None:
        """Have images encoded in the order of their requests.

        What was asked for and now comes later is cancelled, and asked for once more behind the
        others. The first one stays, since it may be half done.
        """
        rank: dict[str, int] = {}
        for request in requests:
            for index in sorted(self._books.get_cached_input_ids(request)):
                rank.setdefault(request.mm_features[index].identifier, len(rank))
        asked = list(self._under_way)
        half_done = asked[0] if asked[0] not in self._to_encode else None
        order = sorted(asked, key=lambda each: (each != half_done, rank.get(each, len(rank))))
        moved = dropwhile(lambda pair: pair[0] == pair[1], zip(asked, order, strict=True))
        for _, identifier in list(moved):
            feature = self._under_way.pop(identifier)
            if self._to_encode.pop(identifier, None) is None:
                self._to_cancel.append(identifier)
            self._under_way[identifier] = self._to_encode[identifier] = feature

    def _fits(self, request: Request, missing: list[int]) -> bool:
        room, too_much = self._room_for(request, missing), self._is_too_much(request, missing)
        return room >= 0 and not too_much

    def _room_for(self, request: Request, missing: list[int]) -> int:
        """Room in the cache beyond what images take that no request refers to yet."""
        sizes = {
            request.mm_features[index].identifier: request.get_num_encoder_embeds(index)
            for index in missing
            if not self._books.cached.get(request.mm_features[index].identifier)
        }
        return self._books.num_freeable_slots - sum(sizes.values())

    def _is_too_much(self, request: Request, missing: list[int]) -> bool:
        """Whether more bytes would be asked for than are to be held at a time."""
        features = [request.mm_features[index] for index in missing]
        absent = [each for each in features if each.identifier not in self._books.cached]
        if not absent or not self._under_way:
            return False
        under_way = sum(map(num_bytes, self._under_way.values()))
        return under_way + sum(map(num_bytes, absent)) > MAX_BYTES_AHEAD

    def _make_room(self, request: Request, missing: list[int], before: Container[str]) -> None:
        """Give back what later requests have reserved, the last one's first, as far as needed."""
        later = [each for each in self._holders.values() if each.request_id not in before]
        while later and not self._fits(request, missing):
            last = later.pop()
            self._books.free(last)
            del self._holders[last.request_id]
            self._withdraw()

    def _withdraw(self) -> None:
        """Cancel the images to which no request refers any more."""
        for identifier in [each for each in self._under_way if not self._books.cached.get(each)]:
            del self._under_way[identifier]
            if self._to_encode.pop(identifier, None) is None:
                self._to_cancel.append(identifier)
            if identifier in self._books.freeable:
                forget_image(self._books, identifier)

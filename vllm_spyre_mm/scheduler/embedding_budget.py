# SPDX-License-Identifier: Apache-2.0
"""The memory budget of the embeddings that requests get back, and counts of images and embeddings.

A request's embedding takes memory from its prefill until it finishes: in the worker first, then in
the front end. The scheduler knows when both happen, and the size of the embedding beforehand, so it
keeps the bound by admitting requests later.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from vllm_spyre_mm.multimodal.embedding import item_sizes
from vllm_spyre_mm.multimodal.embedding_choice import choice_of
from vllm_spyre_mm.multimodal.given_features import given_features
from vllm_spyre_mm.multimodal.merge import first_feature
from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping
from vllm_spyre_mm.scheduler.outputs import SpyreSchedulerStats

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request

    from vllm_spyre_mm.config import SpyreSettings


class EmbeddingBudget:
    """Embedding bytes held by admitted requests, and counts for the statistics.

    Args:
        settings: of the engine; gives the bound.
        model_config: of the engine; gives the model's mapping, which knows the width of a row.
    """

    def __init__(self, settings: "SpyreSettings", model_config: "ModelConfig") -> None:
        self._settings = settings
        self._mapping = get_mm_mapping(model_config.hf_config)
        self._held: dict[str, int] = {}
        self._encoder_runs = 0
        self._encoder_cache_hits = 0
        self._returned = 0

    def num_bytes(self, request: "Request") -> int:
        """Bytes of the embedding that a request will hold; 0 if it gets none."""
        if not request.mm_features:
            return 0
        choice = choice_of(request.sampling_params, self._settings)
        if choice is None:
            return 0
        mapping = self._mapping
        return choice.num_bytes(
            item_sizes(choice, request.mm_features, mapping.feature_layout),
            mapping.text_config.hidden_size,
            mapping.feature_width,
            self._settings.encoder_dtype,
        )

    def held(self, requests: Collection[str]) -> int:
        """Bytes of the embeddings of admitted, unfinished requests.

        Args:
            requests: ids of all unfinished requests; entries of other requests are dropped.
        """
        for req_id in [req_id for req_id in self._held if req_id not in requests]:
            del self._held[req_id]
        return sum(self._held.values())

    def has_room(self, request: "Request", requests: Collection[str]) -> bool:
        """Whether a waiting request may be admitted beside the others.

        No request waits for ever: one that exceeds the bound alone is refused when it is submitted,
        or served alone if a video's frames were not known then.

        Args:
            request: the waiting request; a preempted one is counted already.
            requests: ids of all unfinished requests.
        """
        if request.request_id in self._held:
            return True
        num_bytes = self.num_bytes(request)
        if num_bytes == 0:
            return True
        held = self.held(requests)
        return held == 0 or held + num_bytes <= self._settings.max_held_mm_embedding_bytes

    def record_prefill(
        self,
        output: "SchedulerOutput",
        requests: "Mapping[str, Request]",
        encoded_ahead: Collection[tuple[str, int]] = (),
    ) -> None:
        """Count the embeddings that a prefill step admits, and its images.

        Args:
            output: vLLM's; ``num_computed_tokens`` of its requests includes this step already.
            requests: all unfinished requests.
            encoded_ahead: request id and index of images that were encoded ahead of time for that
                request: they are no hits, and :meth:`record_runs` counts them.
        """
        admitted = {new.req_id for new in output.scheduled_new_reqs}
        for req_id in admitted:
            if num_bytes := self.num_bytes(requests[req_id]):
                self._held[req_id] = num_bytes
        admitted |= output.scheduled_cached_reqs.resumed_req_ids
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            self._count_images(
                requests[req_id],
                scheduled=output.scheduled_encoder_inputs.get(req_id, ()),
                encoded_ahead=encoded_ahead,
                num_tokens=num_tokens,
                admitted=req_id in admitted,
            )

    def _count_images(
        self,
        request: "Request",
        scheduled: Collection[int],
        encoded_ahead: Collection[tuple[str, int]],
        num_tokens: int,
        admitted: bool,
    ) -> None:
        """Count each image once: in the step that reaches its first feature, or else in the
        admitting one.

        Images that a prefix-cache hit covers count only if the request's embedding is collected.
        Images that are given as embeddings are neither runs nor hits.
        """
        end = request.num_computed_tokens
        start = end - num_tokens
        collects = admitted and request.request_id in self._held and not request.num_output_tokens
        for index, feature in enumerate(request.mm_features or ()):
            position = feature.mm_position
            if given_features(feature) is not None or (request.request_id, index) in encoded_ahead:
                continue
            if index in scheduled:
                self._encoder_runs += self._settings.missing_features == "encode"
            elif (0 if admitted else start) <= first_feature(position) < end and (
                collects or position.offset + position.length > start
            ):
                self._encoder_cache_hits += 1

    def record_runs(self, num_images: int) -> None:
        """Count images that were encoded and that no step had asked for.

        Where nothing is encoded ahead, an EC connector had them and did not bring them: each was
        taken for a hit.
        """
        self._encoder_runs += num_images
        if not self._settings.encode_ahead:
            self._encoder_cache_hits -= num_images

    def record_returned(self, num_embeddings: int) -> None:
        """Count embeddings that the worker has handed over."""
        self._returned += num_embeddings

    def extend(self, stats: "SchedulerStats", requests: Collection[str]) -> SpyreSchedulerStats:
        """Add to vLLM's statistics of a step the counts since the last call.

        Args:
            stats: vLLM's, of the step.
            requests: ids of all unfinished requests.
        """
        extended = SpyreSchedulerStats(
            **vars(stats),
            mm_embedding_held_bytes=self.held(requests),
            encoder_runs=self._encoder_runs,
            encoder_cache_hits=self._encoder_cache_hits,
            mm_embeddings_returned=self._returned,
        )
        self._encoder_runs = self._encoder_cache_hits = self._returned = 0
        return extended

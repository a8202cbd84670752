# SPDX-License-Identifier: Apache-2.0
"""Which step comes next: one chunk of one prefill, or a decode of the running requests.

vLLM's scheduler does all the bookkeeping (blocks, encoder cache, queues, finished requests). This
subclass decides what kind of step it is, shows ``super().schedule()`` only the requests that take
part, and keeps every chunk on Spyre's grid (:mod:`vllm_spyre_mm.geometry`). Waiting requests with
and without images take turns (:mod:`vllm_spyre_mm.request_queue`).
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.embedding_accounts import EmbeddingAccounts
from vllm_spyre_mm.engine_config import geometry_of
from vllm_spyre_mm.model_executor.memory import return_free_memory
from vllm_spyre_mm.multimodal.embedding import choice_of
from vllm_spyre_mm.request_queue import TurnsQueue
from vllm_spyre_mm.vllm_hooks.contract import require, require_attributes, require_overridable
from vllm_spyre_mm.vllm_hooks.engine_output import attach_mm_embeddings, give_reason
from vllm_spyre_mm.worker.requests import FailedEncoding, SpyreModelRunnerOutput

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.engine import EngineCoreOutputs


class SpyreScheduler(Scheduler):
    """vLLM's synchronous scheduler in Spyre's geometry."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_base()
        self._check_parts()
        if self.policy == SchedulingPolicy.FCFS:
            self.waiting = TurnsQueue()
        self.geometry = geometry_of(self.vllm_config)
        self.settings = SpyreSettings.from_vllm_config(self.vllm_config)
        self._accounts = EmbeddingAccounts(self.settings, self.vllm_config.model_config)
        self._last_step_was_prefill = False
        # To learn how many tokens a picture may have, vLLM has processed the largest.
        return_free_memory()

    @classmethod
    def check_base(cls) -> None:
        """Check that vLLM's scheduler has, and calls as expected, what is overridden here.

        Raises:
            UnsupportedVllmError: names what is missing or differs.
        """
        require_overridable(Scheduler, cls._get_local_prefix_cache_hit, returned=4)
        require_overridable(Scheduler, cls._reserve_prefill_lookahead)
        require_overridable(Scheduler, cls._try_schedule_encoder_inputs, returned=5)
        require_overridable(Scheduler, cls.schedule)
        require_overridable(Scheduler, cls.update_from_output)
        require_attributes(Scheduler, ("make_stats",))
        missing = sorted(TurnsQueue.__abstractmethods__)
        require(not missing, f"its queue of waiting requests has {', '.join(missing)} too")

    def _check_parts(self) -> None:
        """Check what this subclass reads and sets of vLLM's scheduler and its parts."""
        require_attributes(
            self,
            (
                "deferred_waiting",
                "encoder_cache_mismatch_reqs",
                "max_num_active_reqs",
                "num_waiting_for_streaming_input",
                "waiting",
            ),
        )
        require_attributes(
            type(self.kv_cache_manager), ("evict_blocks", "truncate_computed_blocks")
        )
        require_attributes(
            self.encoder_cache_manager,
            ("cached", "freeable", "num_embeds_by_hash", "num_free_slots"),
        )

    # -- the kind of step ---------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule one chunk of one prefill, or a decode.

        The two alternate while there is work for both, so that a running request waits for one
        chunk at most between two tokens, and a prompt for one decode between two chunks.
        """
        prefilling = [request for request in self.running if request.is_prefill_chunk]
        decoding = [request for request in self.running if not request.is_prefill_chunk]
        rows = self.geometry.decode_rows_that_fit([request.num_tokens for request in decoding])
        may_admit = (
            bool(self.waiting)
            and not prefilling
            and self._free_places() > 0
            and len(rows) == len(decoding)
            and self._has_room(decoding)
        )

        prefill = may_admit or bool(prefilling)
        if prefill and decoding and self._last_step_was_prefill:
            prefill = False
        self._last_step_was_prefill = prefill
        if prefill:
            visible, admit = prefilling[:1], int(may_admit)
        else:
            visible, admit = [decoding[row] for row in rows], 0
        with self._showing(visible, admit):
            output = super().schedule(throttle_prefills)
        if prefill:
            self._accounts.record_prefill(output, self.requests)
        for new in output.scheduled_new_reqs:
            # vLLM leaves out the pixels of images that a prefix-cache hit covers. The worker may
            # need them: for the embedding, or after a preemption that lost the hit.
            new.mm_features = self.requests[new.req_id].mm_features
        return output

    def _free_places(self) -> int:
        """Requests that may run besides those that do, by their number alone."""
        taken = len(self.running) + self.num_waiting_for_streaming_input
        return max(0, self.max_num_active_reqs - taken)

    def _has_room(self, decoding: list[Request]) -> bool:
        """Whether one more request fits beside the decoding ones.

        By the bound on batch × length, in which a prompt is counted with the token that it will
        decode, and by the bound on the embeddings held.
        """
        lengths = [request.num_tokens for request in decoding]
        return all(
            len(self.geometry.decode_rows_that_fit([*lengths, request.num_tokens + 1]))
            == len(lengths) + 1
            and self._accounts.has_room(request, self.requests)
            for request in self._next_candidates()
        )

    def _next_candidates(self) -> Iterator[Request]:
        """The waiting requests of which one may be admitted next.

        That is the first one; where it waits for something else (its grammar), vLLM passes over it.
        """
        for request in self.waiting:
            yield request
            if request not in self.deferred_waiting:
                return

    @contextlib.contextmanager
    def _showing(self, visible: list[Request], admit: int) -> Iterator[None]:
        """Let ``super().schedule()`` see some running requests and admit at most ``admit`` others.

        The order of the running requests is kept, requests that were preempted leave it, and
        admitted ones come last, whatever happens inside.
        """
        everyone, limit = self.running, self.max_num_active_reqs
        admitted = min(admit, self._free_places())
        hidden: list[Request] = []
        if len(visible) < len(everyone):
            shown = {request.request_id for request in visible}
            hidden = [request for request in everyone if request.request_id not in shown]
        self.running = visible
        self.max_num_active_reqs = len(visible) + self.num_waiting_for_streaming_input + admitted
        try:
            yield
        finally:
            self.max_num_active_reqs = limit
            if hidden:
                kept = {request.request_id for request in (*self.running, *hidden)}
                known = {request.request_id for request in everyone}
                self.running = [
                    *(request for request in everyone if request.request_id in kept),
                    *(request for request in self.running if request.request_id not in known),
                ]

    # -- the grid of chunks -------------------------------------------------------------------

    def _get_local_prefix_cache_hit(
        self, request: Request
    ) -> "tuple[KVCacheBlocks, int, int, bool]":
        """Round a prefix-cache hit down to where a prefill may start; nothing is allocated yet."""
        blocks, num_hit, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        start = self.geometry.prefill_start(request.num_tokens, num_hit)
        if start < num_hit:
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, start)
        return blocks, start, boundary, diverged

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """End a chunk where the grid says; vLLM asks this last, for every request."""
        if num_new_tokens <= 1:
            return num_new_tokens  # no chunk is shorter
        return min(num_new_tokens, self._chunk_tokens(request, num_computed_tokens))

    def _chunk_tokens(self, request: Request, num_computed_tokens: int) -> int:
        end = self.geometry.chunk_end(request.num_tokens, num_computed_tokens)
        return end - num_computed_tokens

    # -- encoding -----------------------------------------------------------------------------

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """Encode what the chunk needs, and what the request's embedding needs besides.

        A request that returns its embedding wants the features of images that a prefix-cache hit
        covers too: at its admission the window starts at the prompt's start. Cached features are
        referenced, evicted ones encoded once more, and the hit is kept.
        """
        chunk = min(num_new_tokens, self._chunk_tokens(request, num_computed_tokens))
        start = 0 if self._collects_from_start(request) else num_computed_tokens
        window = num_computed_tokens + chunk - start
        inputs, scheduled, budget, external, duplicates = super()._try_schedule_encoder_inputs(
            request, start, window, encoder_compute_budget, shift_computed_tokens
        )
        if scheduled < window:
            # An image does not fit now. The chunk cannot end before it, in the middle of a
            # block: the request waits, holding no features.
            if request.status != RequestStatus.RUNNING:
                self.encoder_cache_manager.free(request)
            return [], 0, encoder_compute_budget, [], []
        return inputs, chunk, budget, external, duplicates

    def _collects_from_start(self, request: Request) -> bool:
        """Whether this is the admission of a request whose embedding is still to be collected."""
        return (
            request.status != RequestStatus.RUNNING
            and request.num_output_tokens == 0
            and choice_of(request.sampling_params, self.settings) is not None
        )

    # -- outputs ------------------------------------------------------------------------------

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> "dict[int, EngineCoreOutputs]":
        """vLLM's bookkeeping, with each embedding put on its request's first output."""
        if not isinstance(model_runner_output, SpyreModelRunnerOutput):
            return super().update_from_output(scheduler_output, model_runner_output)
        failed = model_runner_output.failed_encoding
        if failed is None:
            self._accounts.record_returned(len(model_runner_output.mm_embeddings))
            outputs = super().update_from_output(scheduler_output, model_runner_output)
            attach_mm_embeddings(
                outputs,
                model_runner_output.mm_embeddings,
                model_runner_output.mm_embedding_infos,
            )
            return outputs
        # vLLM ends these with FinishReason.ERROR; one that was aborted meanwhile is unknown to it.
        self.encoder_cache_mismatch_reqs.add(failed.req_id)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._take_back(failed)
        give_reason(outputs, failed.req_id, failed.reason)
        return outputs

    def _take_back(self, failed: FailedEncoding) -> None:
        """Undo what vLLM noted when it scheduled a step whose request failed.

        Blocks are offered to other prompts as soon as they are allocated, images to other requests
        as soon as they are scheduled, and neither was computed. No other request has seen them:
        only its own step came since, and the request itself is gone.
        """
        self.kv_cache_manager.evict_blocks(set(failed.block_ids))
        images = self.encoder_cache_manager
        for identifier in set(failed.identifiers):
            del images.cached[identifier], images.num_embeds_by_hash[identifier]
            images.num_free_slots += images.freeable.pop(identifier)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics of a step, with those of the embeddings."""
        stats = super().make_stats(*args, **kwargs)
        return None if stats is None else self._accounts.extend(stats, self.requests)

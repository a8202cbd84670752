# SPDX-License-Identifier: Apache-2.0
"""The scheduler: each step is one chunk of one prefill, or a decode of the running requests.

vLLM's scheduler does all the bookkeeping: blocks and whom to preempt for them, encoder cache,
queues, finished requests. The subclass decides which of the running requests take part in a step,
and keeps every chunk on Spyre's grid (:mod:`vllm_spyre_mm.scheduler.geometry`).
"""

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.host_memory import return_free_memory
from vllm_spyre_mm.scheduler.embedding_budget import EmbeddingBudget
from vllm_spyre_mm.scheduler.encode_ahead import EncodeAhead
from vllm_spyre_mm.scheduler.failed_step import undo_failed_step
from vllm_spyre_mm.scheduler.geometry import geometry_of
from vllm_spyre_mm.scheduler.outputs import (
    SpyreModelRunnerOutput,
    attach_mm_embeddings,
    give_reasons,
)
from vllm_spyre_mm.scheduler.request_queue import AlternatingQueue, next_candidates
from vllm_spyre_mm.scheduler.step import Step, carry_over
from vllm_spyre_mm.scheduler.vllm_parts import check_methods, check_parts

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.engine import EngineCoreOutputs


class SpyreScheduler(Scheduler):
    """vLLM's synchronous scheduler in Spyre's geometry.

    1. *A step is one chunk of one prefill, or a decode.* The two alternate while there is work for
       both, so that a running request waits for one chunk at most between two tokens, and a prompt
       for one decode between two chunks (or two, see 5). A request is admitted by its first chunk,
       when no other prefill is under way. Where nothing can be prefilled after all, for want of
       blocks or of room in the encoder cache, the step is a decode: none is empty while anything
       can be computed.
    2. *Running requests have an order*, in which ``running`` is kept: that of their admission, or
       with the priority policy that of priority and arrival. In a decode the bound on batch ×
       padded length is filled in that order: the first always takes part, others may pause.
    3. *Blocks are taken from the last in that order*, whether it decodes, pauses or is in the
       middle of its prefill: the first never loses its blocks while another holds any.
    4. *Waiting requests are admitted in turns*, with images and without, and preempted ones before
       both (:mod:`.request_queue`); with the priority policy in vLLM's order.
    5. *Images of waiting requests are encoded ahead of time* (:mod:`.encode_ahead`), and a request
       that waits for its images is passed over. On a CPU pieces of encoding take turns with chunks,
       and a decode follows each: between two tokens of a request there is one of either.

    vLLM sees all running requests in every step, and gives no tokens to those that do not take part
    (:meth:`_reserve_prefill_lookahead`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_base()
        check_parts(self)
        settings = SpyreSettings.from_vllm_config(self.vllm_config)
        self._ahead = EncodeAhead(self, self._collects_from_start, settings)
        if self.policy == SchedulingPolicy.FCFS:
            self.waiting = AlternatingQueue(self._ahead.is_ready)
        self.geometry = geometry_of(self.vllm_config)
        self._embedding_budget = EmbeddingBudget(settings, self.vllm_config.model_config)
        self._last_step_was_prefill = False
        self._step = Step(False, frozenset())
        # vLLM has processed the largest possible picture to learn its number of tokens.
        return_free_memory()

    @classmethod
    def check_base(cls) -> None:
        """Check that vLLM's scheduler has, and calls as expected, what is overridden here.

        Raises:
            UnsupportedVllmError: names what is missing or differs.
        """
        check_methods(cls)
        AlternatingQueue.check_base()

    # -- choice of the step --------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule one chunk of one prefill, or a decode, as the rules of the class say."""
        if self.policy == SchedulingPolicy.PRIORITY:
            # vLLM's loop ends at the first request that gets no blocks.
            self.running.sort(key=lambda request: (request.priority, request.arrival_time))
        self._ahead.look_ahead()
        decodes = any(not request.is_prefill_chunk for request in self.running)
        output = self._schedule(throttle_prefills)
        is_chunk = self._step.is_prefill and output.total_num_scheduled_tokens > 0
        return self._ahead.instruct(output, is_chunk, decodes)

    def _schedule(self, throttle_prefills: bool) -> SchedulerOutput:
        step = self._next_step()
        output = self._run(step, throttle_prefills)
        if self.pause_state != PauseState.PAUSED_ALL:  # where nobody gets a token
            self._last_step_was_prefill = step.is_prefill
        if step.is_prefill:
            if not output.num_scheduled_tokens and (decode := self._decode_step()).taking_part:
                return carry_over(output, self._run(decode, throttle_prefills))
            self._embedding_budget.record_prefill(output, self.requests, self._ahead.asked)
        for new in output.scheduled_new_reqs:
            # vLLM leaves out the pixels of images that a prefix-cache hit covers. The worker may
            # need them: for the embedding, or after a preemption that lost the hit.
            new.mm_features = self.requests[new.req_id].mm_features
        return output

    def _next_step(self) -> Step:
        decode = self._decode_step()
        if decode.taking_part and (self._last_step_was_prefill or self._ahead.owes_a_piece):
            return decode
        prefilling = [each.request_id for each in self.running if each.is_prefill_chunk]
        may_admit = not prefilling and self._may_admit(len(decode.taking_part))
        if prefilling or may_admit:
            return Step(True, frozenset(prefilling[:1]), may_admit)
        return decode

    def _decode_step(self) -> Step:
        """A decode of the running requests that the bound on batch × padded length allows."""
        decoding = [request for request in self.running if not request.is_prefill_chunk]
        rows = self.geometry.decode_rows_that_fit([request.num_tokens for request in decoding])
        return Step(False, frozenset(decoding[row].request_id for row in rows))

    def _may_admit(self, num_decoding: int) -> bool:
        """Whether the step may admit a waiting request; vLLM may still find no blocks for it.

        Args:
            num_decoding: running requests that the next decode has room for.
        """
        is_open = self.pause_state == PauseState.UNPAUSED
        has_slot = self._num_active() < self.max_num_active_reqs
        return is_open and has_slot and num_decoding == len(self.running) and self._has_room()

    def _has_room(self) -> bool:
        """Whether a waiting request is ready and fits beside the running ones, all of which decode.

        Two bounds apply: batch × padded length, where a prompt counts with the token that it will
        decode, and the bytes of the embeddings held.
        """
        lengths = [request.num_tokens for request in self.running]
        in_transit = self.deferred_waiting if self.ec_connector is not None else ()
        candidates = list(next_candidates(filter(self._ahead.is_ready, self.waiting), in_transit))
        return bool(candidates) and all(
            len(self.geometry.decode_rows_that_fit([*lengths, request.num_tokens + 1]))
            == len(lengths) + 1
            and self._embedding_budget.has_room(request, self.requests)
            for request in candidates
        )

    def _run(self, step: Step, throttle_prefills: bool) -> SchedulerOutput:
        """Let vLLM schedule the requests that take part, and admit one where the step may."""
        self._step = step
        limit = self.max_num_active_reqs
        self.max_num_active_reqs = min(limit, self._num_active() + step.may_admit)
        try:
            return super().schedule(throttle_prefills)
        finally:
            self.max_num_active_reqs = limit

    def _num_active(self) -> int:
        """Requests that count against ``max_num_active_reqs``."""
        return len(self.running) + self.num_waiting_for_streaming_input

    def _sits_out(self, request: Request) -> bool:
        """Whether a request runs and does not take part in the step that is being scheduled."""
        taking_part = self._step.taking_part
        return request.status == RequestStatus.RUNNING and request.request_id not in taking_part

    # -- the grid of chunks -------------------------------------------------------------------

    def _get_local_prefix_cache_hit(
        self, request: Request, *limits: Any
    ) -> "tuple[KVCacheBlocks, int, int, bool]":
        """Round a prefix-cache hit down to a position where a prefill may start."""
        blocks, num_hit, boundary, diverged = super()._get_local_prefix_cache_hit(request, *limits)
        start = self.geometry.prefill_start(request.num_tokens, num_hit)
        if start < num_hit:
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, start)
        return blocks, start, boundary, diverged

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """End a chunk at the grid's boundary; vLLM asks this last, for every request.

        A request that gets 0 tokens is passed over.
        """
        if self._sits_out(request):
            return 0
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
        """Choose the images to encode: for the chunk, and for the request's embedding.

        A request that returns its embedding wants the features of images that a prefix-cache hit
        covers too: at its admission the window starts at the prompt's start. Cached features are
        referenced, evicted ones encoded once more, and the hit is kept.
        """
        if self._sits_out(request):
            return [], 0, encoder_compute_budget, [], []
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
                self.max_num_active_reqs = self._num_active()  # none behind it overtakes it
            return [], 0, encoder_compute_budget, [], []
        return inputs, chunk, budget, external, duplicates

    def _ec_transfer_pending(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether a waiting request waits for features; vLLM passes over such ones.

        Nobody behind it is admitted in this step, unless :meth:`_has_room` has looked behind it:
        where an EC connector made it wait before, or by priority where it was not ready.
        """
        if super()._ec_transfer_pending(request, num_computed_tokens):
            looked_behind = request in self.deferred_waiting
        elif self._ahead.have_features(request, num_computed_tokens):
            return False
        else:
            by_priority = self.policy == SchedulingPolicy.PRIORITY
            looked_behind = by_priority and not self._ahead.is_ready(request)
        if not looked_behind:
            self.max_num_active_reqs = self._num_active()
        return True

    def reset_encoder_cache(self) -> None:
        """Forget all encoded images, and ask anew for those that are wanted."""
        super().reset_encoder_cache()
        self._ahead.reset()

    def _collects_from_start(self, request: Request) -> bool:
        """Whether the request is about to be admitted and its embedding is not collected yet."""
        return (
            request.status != RequestStatus.RUNNING
            and request.num_output_tokens == 0
            and self._embedding_budget.num_bytes(request) > 0
        )

    # -- outputs ------------------------------------------------------------------------------

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> "dict[int, EngineCoreOutputs]":
        """vLLM's bookkeeping, with each embedding put on its request's first output."""
        if not isinstance(model_runner_output, SpyreModelRunnerOutput):
            return super().update_from_output(scheduler_output, model_runner_output)
        failed = model_runner_output.failed_encoding
        reasons = {} if failed is None else {failed.req_id: failed.reason}
        reasons |= self._ahead.finish(model_runner_output.encodings_done)
        encoded = self._ahead.take_runs() + model_runner_output.num_encoded_anew
        self._embedding_budget.record_runs(encoded)
        # vLLM ends these with FinishReason.ERROR, and ignores one that was aborted meanwhile.
        self.encoder_cache_mismatch_reqs.update(reasons)
        self._embedding_budget.record_returned(len(model_runner_output.mm_embeddings))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if failed is not None:
            undo_failed_step(failed, self.kv_cache_manager, self.encoder_cache_manager)
        self._ahead.forget_faulty()
        give_reasons(outputs, reasons)
        attach_mm_embeddings(
            outputs, model_runner_output.mm_embeddings, model_runner_output.mm_embedding_infos
        )
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics of a step, with those of images and embeddings."""
        stats = super().make_stats(*args, **kwargs)
        return None if stats is None else self._embedding_budget.extend(stats, self.requests)

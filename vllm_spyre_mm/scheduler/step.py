# SPDX-License-Identifier: Apache-2.0
"""What the scheduler decides about a step before vLLM fills it."""

from dataclasses import dataclass

from vllm.v1.core.sched.output import SchedulerOutput


@dataclass(frozen=True, slots=True)
class Step:
    """What a step is to do.

    Attributes:
        is_prefill: it is a chunk of a prompt (of a running request, or of one that is admitted);
            otherwise a decode.
        taking_part: ids of the running requests that compute something in it.
        may_admit: whether a waiting request may be admitted.
    """

    is_prefill: bool
    taking_part: frozenset[str]
    may_admit: bool = False


def carry_over(empty: SchedulerOutput, output: SchedulerOutput) -> SchedulerOutput:
    """Add what a step without tokens was to tell the worker to the step that takes its place."""
    output.finished_req_ids |= empty.finished_req_ids
    output.free_encoder_mm_hashes = [*empty.free_encoder_mm_hashes, *output.free_encoder_mm_hashes]
    output.preempted_req_ids = (empty.preempted_req_ids or set()) | (
        output.preempted_req_ids or set()
    )
    return output

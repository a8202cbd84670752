# SPDX-License-Identifier: Apache-2.0
"""The plan of a step, made before vLLM schedules its tokens."""

from dataclasses import dataclass

from vllm.v1.core.sched.output import SchedulerOutput


@dataclass(frozen=True, slots=True)
class Step:
    """The plan of one step.

    Attributes:
        is_prefill: whether it is a prefill chunk (of a running request, or of one that is admitted)
            or a decode.
        taking_part: ids of the running requests that are given tokens.
        may_admit: whether a waiting request may be admitted.
    """

    is_prefill: bool
    taking_part: frozenset[str]
    may_admit: bool = False


def carry_over(empty: SchedulerOutput, output: SchedulerOutput) -> SchedulerOutput:
    """Add the messages to the worker of a step without tokens to the step that takes its place."""
    output.finished_req_ids |= empty.finished_req_ids
    output.free_encoder_mm_hashes = [*empty.free_encoder_mm_hashes, *output.free_encoder_mm_hashes]
    output.preempted_req_ids = (empty.preempted_req_ids or set()) | (
        output.preempted_req_ids or set()
    )
    return output

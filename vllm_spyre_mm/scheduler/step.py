# SPDX-License-Identifier: Apache-2.0
"""The plan of a step, made before vLLM schedules its tokens."""

from dataclasses import dataclass, replace

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata
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


@dataclass(frozen=True, slots=True)
class CarriedMetadata(ECConnectorMetadata):
    """What the scheduler's side of an EC connector says to the worker's in two steps.

    Attributes:
        earlier: of the step without tokens, which is not sent.
        later: of the step that takes its place.
    """

    earlier: ECConnectorMetadata
    later: ECConnectorMetadata


def carry_over(empty: SchedulerOutput, output: SchedulerOutput) -> SchedulerOutput:
    """Add the messages to the worker of a step without tokens to the step that takes its place."""
    output.finished_req_ids |= empty.finished_req_ids
    output.free_encoder_mm_hashes = [*empty.free_encoder_mm_hashes, *output.free_encoder_mm_hashes]
    output.preempted_req_ids = (empty.preempted_req_ids or set()) | (
        output.preempted_req_ids or set()
    )
    earlier, later = empty.ec_connector_metadata, output.ec_connector_metadata
    if earlier is not None and later is not None:
        output.ec_connector_metadata = CarriedMetadata(earlier, later)
    return output


def connector_steps(output: SchedulerOutput) -> list[SchedulerOutput]:
    """A step as an EC connector is to see it in the worker: with those that it was carried over."""
    metadata = output.ec_connector_metadata
    if not isinstance(metadata, CarriedMetadata):
        return [output]
    return [
        replace(output, ec_connector_metadata=metadata.earlier, finished_req_ids=set()),
        replace(output, ec_connector_metadata=metadata.later),
    ]

# SPDX-License-Identifier: Apache-2.0
"""A step without tokens gives its messages to the one that is sent in its place."""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput

from tests.worker.connector_stub import Metadata
from vllm_spyre_mm.scheduler.step import carry_over, connector_steps


def output(metadata: Any, finished: str) -> SchedulerOutput:
    made = SchedulerOutput.make_empty()
    made.ec_connector_metadata, made.finished_req_ids = metadata, {finished}
    return made


def test_a_connector_sees_both_steps() -> None:
    early, late = Metadata(), Metadata()
    sent = carry_over(output(early, "a"), output(late, "b"))
    assert sent.finished_req_ids == {"a", "b"}
    steps = connector_steps(sent)
    assert [each.ec_connector_metadata for each in steps] == [early, late]
    assert [each.finished_req_ids for each in steps] == [set(), {"a", "b"}]


def test_a_step_of_its_own_is_seen_as_it_is() -> None:
    alone = output(Metadata(), "a")
    assert connector_steps(alone) == [alone]


def test_without_a_connector_nothing_is_carried_to_it() -> None:
    assert carry_over(output(None, "a"), output(None, "b")).ec_connector_metadata is None

# SPDX-License-Identifier: Apache-2.0
"""Whatever is asked is finished within the rules."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.config.scheduler import SchedulerPolicy
from vllm.v1.request import Request, RequestStatus

from tests.scheduler.simulation import MAX_MODEL_LEN, Simulation, check_gaps, make_request
from vllm_spyre_mm.scheduler.scheduler import SpyreScheduler

pytestmark = pytest.mark.usefixtures("no_blocks_left")


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """Requests: prompt length, tokens wanted, prompt contents, step at which it arrives."""
    request = st.tuples(
        st.integers(1, 700), st.integers(1, 40), st.integers(1, 2), st.integers(0, 30)
    )
    return draw(st.lists(request, min_size=1, max_size=9))


def request_of(number: int, drawn: tuple[int, int, int, int]) -> Request:
    length, wanted, contents, _ = drawn
    images = {}
    if length > 8:
        images = {
            f"i{contents}-{length}": (length // 4, length // 4),
            f"i{number}": (length // 2, length // 4),
        }
    request = make_request(f"r{number}", length, max_tokens=wanted, fill=contents, images=images)
    request.priority = length % 3
    return request


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    workload=workloads(),
    num_blocks=st.sampled_from([17, 18, 24, 60]),
    bound=st.sampled_from([1024, 2048]),
    policy=st.sampled_from(["fcfs", "priority"]),
    aborted=st.integers(0, 8),
    faulty=st.integers(0, 20),
    pieces=st.integers(0, 4),
    rows=st.sampled_from([350, 1024]),
    emptied=st.sets(st.integers(1, 30), max_size=3),
)
def test_any_workload_finishes_within_the_rules(
    make: Callable[..., SpyreScheduler],
    workload: list[tuple[int, int, int, int]],
    num_blocks: int,
    bound: int,
    policy: SchedulerPolicy,
    aborted: int,
    faulty: int,
    pieces: int,
    rows: int,
    emptied: set[int],
) -> None:
    """With images that are encoded in so many pieces beside the steps, or, with none, in a step.

    The encoder cache has so many rows, at least those of one request's images, and is emptied
    before some of the steps.
    """
    scheduler = make(num_blocks, bound, policy, encode_ahead=pieces > 0)
    books = scheduler.encoder_cache_manager
    books.cache_size = books.num_free_slots = books.num_freeable_slots = rows
    simulation = Simulation(scheduler, pieces=pieces)
    if pieces and faulty < len(workload):
        simulation.faults = {f"i{faulty}": "could not be encoded"}
    pending = sorted(enumerate(workload), key=lambda item: item[1][3])
    for step in range(31):
        while pending and pending[0][1][3] <= step:
            scheduler.add_request(request_of(*pending.pop(0)))
        if step in emptied:
            scheduler.reset_encoder_cache()
            simulation.cached.clear()
        simulation.step()
        if step == 20:
            scheduler.finish_requests(f"r{aborted}", RequestStatus.FINISHED_ABORTED)
    simulation.run()
    check_gaps(simulation)
    for number, (length, wanted, _, _) in enumerate(workload):
        if f"r{number}" in simulation.reasons:
            assert number == faulty
        elif number != aborted:
            assert simulation.outputs[f"r{number}"] == min(wanted, MAX_MODEL_LEN - length)

# SPDX-License-Identifier: Apache-2.0
"""Who loses its blocks, and that it finishes all the same."""

from collections.abc import Callable

import pytest
from vllm.config import VllmConfig

from tests.scheduler.simulation import Simulation, make_request, make_scheduler, run
from vllm_spyre_mm.scheduler.scheduler import SpyreScheduler

pytestmark = pytest.mark.usefixtures("no_blocks_left")


def test_preempted_requests_finish(vllm_config: VllmConfig) -> None:
    """17 blocks for three requests that need 8 each at their end."""
    scheduler = make_scheduler(vllm_config, num_blocks=18)
    requests = [make_request(f"r{i}", 300, max_tokens=180, fill=30 + i) for i in range(3)]
    simulation = run(scheduler, *requests)
    assert simulation.outputs == {f"r{i}": 180 for i in range(3)}
    resumed = [kind for kind in simulation.kinds if kind[0] == "prefill" and kind[3] > 300]
    assert resumed, "nothing was preempted: the scenario proves nothing"


def test_a_paused_request_gives_its_blocks_to_an_older_one(
    make: Callable[..., SpyreScheduler],
) -> None:
    """2 × 1024 is beyond the bound: ``young`` pauses, and holds blocks that ``old`` needs."""
    scheduler = make(num_blocks=18, bound=1024)
    simulation = run(
        scheduler,
        make_request("old", 500, max_tokens=300, fill=5),
        make_request("young", 500, max_tokens=300, fill=6),
    )
    assert set(simulation.preempted) == {"young"}
    assert simulation.outputs == {"old": 300, "young": 300}


def test_a_prefill_gives_its_blocks_to_an_older_decode(
    make: Callable[..., SpyreScheduler],
) -> None:
    """14 blocks are free when ``young``, which needs 14, is admitted; ``old`` grows meanwhile."""
    scheduler = make(num_blocks=18, bound=2048)
    scheduler.add_request(make_request("old", 190, max_tokens=100, fill=5))
    simulation = Simulation(scheduler)
    simulation.step()
    simulation.step()
    scheduler.add_request(make_request("young", 890, max_tokens=4, fill=6))
    simulation.run()
    assert set(simulation.preempted) == {"young"}
    assert simulation.outputs == {"old": 100, "young": 4}


def test_with_priorities_the_most_urgent_keeps_its_blocks_and_its_place(
    make: Callable[..., SpyreScheduler],
) -> None:
    scheduler = make(num_blocks=18, bound=1024, policy="priority")
    scheduler.add_request(make_request("late", 400, max_tokens=300, fill=5))
    simulation = Simulation(scheduler)
    for _ in range(5):
        simulation.step()
    urgent = make_request("urgent", 400, max_tokens=300, fill=6)
    urgent.priority = -1
    scheduler.add_request(urgent)
    simulation.run()
    assert set(simulation.preempted) == {"late"}
    assert simulation.outputs == {"late": 300, "urgent": 300}

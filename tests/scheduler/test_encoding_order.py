# SPDX-License-Identifier: Apache-2.0
"""In which order images of waiting requests are encoded, by priority and else."""

from pathlib import Path

import pytest
from vllm.config import VllmConfig
from vllm.v1.request import Request

from tests.scheduler.simulation import (
    Simulation,
    add,
    admissions,
    check_gaps,
    give_pixels,
    make_config,
    make_request,
    make_scheduler,
    picture,
    until,
)
from vllm_spyre_mm.scheduler import image_reservations

pytestmark = pytest.mark.usefixtures("no_blocks_left")


@pytest.fixture(scope="module")
def vllm_config(demo_checkpoint: Path) -> VllmConfig:
    return make_config(demo_checkpoint, encode_ahead=True)


@pytest.fixture
def by_priority(vllm_config: VllmConfig) -> Simulation:
    vllm_config.scheduler_config.policy = "priority"
    try:
        return Simulation(make_scheduler(vllm_config))
    finally:
        vllm_config.scheduler_config.policy = "fcfs"


def urgent(name: str, *sizes: int, priority: int = -1) -> Request:
    request = picture(name, *sizes)
    request.priority = priority
    return request


def test_by_priority_those_whose_images_are_encoded_go_on(by_priority: Simulation) -> None:
    by_priority.pieces = 10
    add(by_priority, urgent("urgent"), make_request("later", 40))
    by_priority.step()
    assert by_priority.kinds == [("piece",), ("prefill", "later", 0, 40)]
    by_priority.run()
    check_gaps(by_priority)


def test_the_images_of_an_urgent_request_are_encoded_next(by_priority: Simulation) -> None:
    """Behind that which is half done, and before those that were asked for earlier."""
    add(by_priority, *(picture(name) for name in "abc"))
    by_priority.step()
    add(by_priority, urgent("urgent"))
    by_priority.step()
    assert by_priority.cancelled == ["of b", "of c"]
    by_priority.run()
    assert by_priority.encoded == ["of a", "of urgent", "of b", "of c"]
    assert by_priority.cancelled == ["of b", "of c"]
    assert admissions(by_priority.kinds) == ["a", "urgent", "b", "c"]


def test_room_and_bytes_are_taken_from_the_least_urgent(
    by_priority: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_reservations, "MAX_BYTES_AHEAD", 1000)
    by_priority.pieces = 10
    for request in (picture("a"), picture("b"), urgent("urgent")):
        give_pixels(request)
        add(by_priority, request)
        by_priority.step()
    assert list(by_priority.asked) == ["of a", "of urgent"]  # of 400 bytes each
    add(by_priority, urgent("large", 1000, 960, priority=-2))
    by_priority.step()
    assert list(by_priority.asked) == ["of urgent", "of large"]
    assert by_priority.cancelled == ["of b", "of a"]
    by_priority.run()
    assert by_priority.encoded == ["of urgent", "of large", "of a", "of b"]


def test_a_prefill_whose_images_are_forgotten_holds_nobody_up(vllm_config: VllmConfig) -> None:
    """The encoder cache is emptied in the middle of it; its image is encoded next."""
    simulation = Simulation(make_scheduler(vllm_config))
    add(simulation, make_request("a", 900, images={"x": (0, 800)}, fill=2))
    until(simulation, lambda: simulation.kinds and simulation.kinds[-1][0] == "prefill")
    simulation.pieces = 10
    add(simulation, picture("b"), picture("c"))
    simulation.step()
    simulation.scheduler.reset_encoder_cache()
    simulation.cached.clear()
    add(simulation, make_request("text", 40))
    simulation.step()
    assert list(simulation.asked) == ["x", "of b", "of c"]
    assert ("prefill", "text", 0, 40) in simulation.kinds[-2:]
    simulation.run()
    assert len(simulation.outputs) == 4

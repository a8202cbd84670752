# SPDX-License-Identifier: Apache-2.0
"""Chunks of prompts and pieces of encoding take turns, with a decode after each."""

from pathlib import Path

import pytest
from vllm.config import VllmConfig
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from tests.scheduler.simulation import (
    CHUNK,
    MAX_MODEL_LEN,
    Simulation,
    add,
    check_gaps,
    make_config,
    make_request,
    make_scheduler,
    picture,
    steps,
    until,
)

pytestmark = pytest.mark.usefixtures("no_blocks_left")


@pytest.fixture(scope="module")
def vllm_config(demo_checkpoint: Path) -> VllmConfig:
    return make_config(demo_checkpoint, encode_ahead=True)


def kinds_of(simulation: Simulation, count: int) -> list[str]:
    """What the next steps are."""
    before = len(simulation.kinds)
    steps(simulation, count)
    return [kind[0] for kind in simulation.kinds[before:]]


@pytest.fixture
def decoding(simulation: Simulation) -> Simulation:
    """A text decodes; images take long."""
    simulation.pieces = 100
    add(simulation, make_request("text", 40, max_tokens=200))
    steps(simulation, 3)
    return simulation


def test_a_chunk_and_a_piece_take_turns_with_a_token_in_between(decoding: Simulation) -> None:
    decoding.pieces = 3
    add(decoding, picture("picture"), make_request("long", 4 * CHUNK, fill=9))
    before = len(decoding.kinds)
    until(decoding, lambda: decoding.outputs.get("long"))
    kinds = [kind[0] for kind in decoding.kinds[before:]]
    turn = ["prefill", "decode", "piece", "decode"]
    assert kinds == [*turn * 3, "prefill"]


def test_a_prefill_that_comes_to_nothing_takes_no_turn(decoding: Simulation) -> None:
    """Here for want of a grammar."""
    blocked = make_request("blocked", 40, fill=9)
    blocked.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    add(decoding, picture("picture"), blocked)
    assert kinds_of(decoding, 9) == ["piece", "decode"] * 9


def test_nor_does_one_without_blocks(vllm_config: VllmConfig) -> None:
    simulation = Simulation(make_scheduler(vllm_config, num_blocks=18))
    simulation.pieces = 100
    add(simulation, make_request("text", 600, max_tokens=200))
    until(simulation, lambda: simulation.outputs.get("text"))
    steps(simulation, 1)
    add(simulation, picture("picture"), make_request("long", 900, fill=9))
    assert kinds_of(simulation, 9) == ["piece", "decode"] * 9


@pytest.mark.parametrize("how", ["aborted", "emptied in a pause"])
def test_images_that_nobody_wants_any_more_take_no_turn(decoding: Simulation, how: str) -> None:
    add(decoding, picture("picture"), make_request("long", 4 * CHUNK, fill=9))
    kinds = kinds_of(decoding, 2)
    if how == "aborted":
        decoding.scheduler.finish_requests("picture", RequestStatus.FINISHED_ABORTED)
    else:
        decoding.scheduler.set_pause_state(PauseState.PAUSED_NEW)
        decoding.scheduler.reset_encoder_cache()
    assert kinds + kinds_of(decoding, 2) == ["prefill", "decode"] * 2


@pytest.mark.parametrize("images", [0, 1])
def test_a_step_in_a_pause_is_no_turn(simulation: Simulation, images: int) -> None:
    """The one in which the worker is told of a request that was aborted meanwhile."""
    add(simulation, *(make_request(name, 40, max_tokens=200) for name in ("text", "gone")))
    steps(simulation, 5)
    add(simulation, *[picture("picture")][:images], make_request("long", 4 * CHUNK, fill=9))
    until(simulation, lambda: simulation.kinds[-1][:2] == ("prefill", "long"))
    simulation.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    simulation.scheduler.finish_requests("gone", RequestStatus.FINISHED_ABORTED)
    assert simulation.scheduler.has_requests()
    simulation.step()
    simulation.scheduler.set_pause_state(PauseState.UNPAUSED)
    steps(simulation, 3)
    check_gaps(simulation)


def test_a_text_waits_for_two_prefills_beside_decodes_and_pieces(simulation: Simulation) -> None:
    """In the worst case: each of their chunks has two decodes behind it."""
    length, chunks = MAX_MODEL_LEN - 10, MAX_MODEL_LEN // CHUNK
    simulation.pieces = 1
    add(simulation, make_request("runs", 40, max_tokens=900), picture("first", max_tokens=1))
    until(simulation, lambda: simulation.outputs.get("first"))
    add(simulation, picture("ready", length, 10))
    scheduler = simulation.scheduler
    scheduler.max_num_active_reqs, limit = 1, scheduler.max_num_active_reqs
    until(simulation, lambda: "of ready" in simulation.cached)
    scheduler.max_num_active_reqs = limit
    simulation.pieces = 1000
    add(simulation, picture("under way", length, 10))
    add(simulation, make_request("long", length, fill=9, max_tokens=100))
    until(simulation, lambda: simulation.kinds[-1][:2] == ("prefill", "long"))
    add(simulation, make_request("text", 40, fill=8))
    before = len(simulation.kinds)
    until(simulation, lambda: simulation.outputs.get("text"))
    kinds = [kind[0] for kind in simulation.kinds[before:] if kind[0] != "piece"]
    assert 4 * chunks + 1 < len(kinds) <= 6 * chunks + 1


def test_on_a_card_no_chunk_waits_for_an_image(demo_checkpoint: Path) -> None:
    """Another process encodes: between two chunks there is one decode, as without images."""
    config = make_config(demo_checkpoint, encode_ahead=True)
    config.additional_config["backend"] = "sendnn"
    simulation = Simulation(make_scheduler(config, num_blocks=200))
    simulation.pieces = 100
    add(simulation, make_request("text", 40, max_tokens=200))
    steps(simulation, 3)
    add(simulation, picture("picture"), make_request("long", 4 * CHUNK, fill=9))
    before = len(simulation.kinds)
    until(simulation, lambda: simulation.outputs.get("long"))
    kinds = [kind[0] for kind in simulation.kinds[before:] if kind[0] != "piece"]
    assert kinds == [*["prefill", "decode"] * 3, "prefill"]

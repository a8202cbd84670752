# SPDX-License-Identifier: Apache-2.0
"""Nobody starves: bounds in steps, on vLLM's real scheduler with a model that is only pretended."""

import math
from pathlib import Path

import pytest
from vllm.config import VllmConfig

from tests.scheduler.simulation import (
    BLOCK,
    CHUNK,
    MAX_MODEL_LEN,
    Simulation,
    admissions,
    make_config,
    make_request,
    make_scheduler,
)
from vllm_spyre_mm.config import SpyreSettings

LONG = MAX_MODEL_LEN - 10
CHUNKS = math.ceil(LONG / CHUNK)

pytestmark = pytest.mark.usefixtures("no_blocks_left")


@pytest.fixture(scope="module", params=[False, True], ids=["in steps", "ahead"])
def vllm_config(demo_checkpoint: Path, request: pytest.FixtureRequest) -> VllmConfig:
    return make_config(demo_checkpoint, encode_ahead=request.param)


def add_images(simulation: Simulation, count: int, max_tokens: int = 4) -> None:
    """Requests with an image each, as long as a request may be, none like another."""
    for number in range(count):
        images = {f"image-{number}": (10, LONG - 20)}
        simulation.scheduler.add_request(
            make_request(
                f"image-{number}", LONG, images=images, fill=number + 20, max_tokens=max_tokens
            )
        )


def add_texts(simulation: Simulation, count: int, max_tokens: int = 4) -> None:
    for number in range(count):
        simulation.scheduler.add_request(
            make_request(f"text-{number}", 40, fill=number + 2000, max_tokens=max_tokens)
        )


def run_until(simulation: Simulation, name: str) -> int:
    """Run until a request has its first token; how many steps that took."""
    for step in range(20_000):
        if simulation.outputs.get(name):
            return step
        simulation.step()
    raise AssertionError(f"{name} starves")


# Steps from one admission to the next, with a slot free: a prefill in chunks, a decode after each.
TURN = 2 * CHUNKS


def test_a_text_behind_500_images_waits_for_two_of_them_at_most(simulation: Simulation) -> None:
    """The one whose prefill is under way, and one whose turn it is."""
    add_images(simulation, 500, max_tokens=1)
    simulation.step()
    add_texts(simulation, 1)
    assert run_until(simulation, "text-0") <= 2 * TURN + 1
    assert len(admissions(simulation.kinds)) <= 3


def test_texts_behind_500_images_take_every_second_turn(simulation: Simulation) -> None:
    add_images(simulation, 500)
    for _ in range(3):
        simulation.step()
    add_texts(simulation, 20)
    steps = run_until(simulation, "text-19")
    order = admissions(simulation.kinds)
    for number in range(20):
        before = order[: order.index(f"text-{number}")]
        assert sum(name.startswith("image") for name in before) <= number + 2
    # Each pair of turns is an image's prefill and a text's, and both may wait for a slot, which is
    # free when the oldest request has its tokens: after three decodes.
    assert steps <= 21 * (TURN + 2 + 2 * 2 * 3)


def test_an_image_behind_500_texts_does_not_starve(simulation: Simulation) -> None:
    """Besides, one text at most is admitted for each piece of its encoding ahead."""
    simulation.pieces = 20
    add_texts(simulation, 500)
    simulation.step()
    add_images(simulation, 1)
    steps = run_until(simulation, "image-0")
    pieces = [number for number, kind in enumerate(simulation.kinds) if kind[0] == "piece"]
    assert len(pieces) in (0, 20)
    assert len(admissions(simulation.kinds)) <= 3 + len(pieces)
    if pieces:
        assert len(admissions(simulation.kinds[pieces[-1] :])) <= 3
    assert steps <= TURN + 2 * (2 + 2 * 3) + 2 * len(pieces)


def test_every_request_of_a_mixed_queue_is_served(simulation: Simulation) -> None:
    add_images(simulation, 40, max_tokens=2)
    add_texts(simulation, 200, max_tokens=2)
    simulation.run(limit=20_000)
    assert len(simulation.outputs) == 240
    assert set(simulation.outputs.values()) == {2}


def test_maximal_prefills_delay_a_decode_by_one_chunk_a_token(simulation: Simulation) -> None:
    """However many of them wait, with images and without, and while they are admitted."""
    add_texts(simulation, 3, max_tokens=300)
    for _ in range(10):
        simulation.step()
    add_images(simulation, 30)
    for number in range(30):
        simulation.scheduler.add_request(make_request(f"long-{number}", LONG, fill=600 + number))
    already = len(simulation.kinds)
    for _ in range(400):
        simulation.step()
    kinds = [kind[0] for kind in simulation.kinds[already:] if kind[0] != "piece"]
    assert kinds.count("prefill") > 150, "nothing was prefilled beside them"
    between = "".join(kind[0] for kind in kinds).split("d")
    assert max(map(len, between)) == 1
    for kind in simulation.kinds[already:]:
        if kind[0] == "decode":
            assert {"text-0", "text-1", "text-2"} <= set(kind[1])


def test_a_prefill_waits_for_one_decode_a_chunk(simulation: Simulation) -> None:
    """The other way round: decodes do not starve a prompt."""
    add_texts(simulation, 3, max_tokens=300)
    for _ in range(10):
        simulation.step()
    add_images(simulation, 1)
    run_until(simulation, "image-0")
    first = simulation.kinds.index(("prefill", "image-0", 0, CHUNK))
    kinds = [kind[0] for kind in simulation.kinds[first:]]
    assert "piece" not in kinds
    assert kinds.count("prefill") == CHUNKS
    assert len(kinds) <= TURN


@pytest.mark.parametrize("with_image", [False, True])
def test_a_lone_request_at_every_limit_finishes(vllm_config: VllmConfig, with_image: bool) -> None:
    """As long as a request may be, in a cache with not one block more than it needs, and alone as
    large an image as the encoder cache holds."""
    scheduler = make_scheduler(vllm_config, num_blocks=1 + MAX_MODEL_LEN // BLOCK)
    length = MAX_MODEL_LEN - 1
    images = {"largest": (0, length - 1)} if with_image else None
    scheduler.add_request(make_request("alone", length, images=images, max_tokens=50))
    simulation = Simulation(scheduler).run(limit=2 * CHUNKS + 2)
    assert simulation.outputs == {"alone": 1}


def test_vllms_policy_of_priorities_is_kept(vllm_config: VllmConfig) -> None:
    """Among those whose images are encoded, and in the order of encoding."""
    vllm_config.scheduler_config.policy = "priority"
    try:
        simulation = Simulation(make_scheduler(vllm_config, num_blocks=200))
        add_images(simulation, 3)
        urgent = make_request("urgent", LONG, images={"x": (0, 30)}, fill=3)
        urgent.priority = -1
        simulation.scheduler.add_request(urgent)
        add_texts(simulation, 1)
        simulation.run()
    finally:
        vllm_config.scheduler_config.policy = "fcfs"
    order = ["urgent", "image-0", "image-1", "image-2", "text-0"]
    if SpyreSettings.from_vllm_config(vllm_config).encode_ahead:
        order = ["text-0", *order[:-1]]  # it has no image to wait for
    assert admissions(simulation.kinds) == order
    assert simulation.encoded == ["x", "image-0", "image-1", "image-2"]

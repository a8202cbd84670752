# SPDX-License-Identifier: Apache-2.0
"""Images of waiting requests are encoded beside the steps of running ones."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from vllm.config import VllmConfig
from vllm.multimodal.inputs import PlaceholderRange
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from tests.scheduler.simulation import (
    CHUNK,
    MAX_MODEL_LEN,
    Simulation,
    add,
    admissions,
    check_gaps,
    give_pixels,
    make_config,
    make_request,
    make_scheduler,
    picture,
    steps,
    until,
)
from vllm_spyre_mm.scheduler import image_reservations
from vllm_spyre_mm.scheduler.outputs import SpyreSchedulerOutput
from vllm_spyre_mm.scheduler.request_queue import AlternatingQueue

pytestmark = pytest.mark.usefixtures("no_blocks_left")


@pytest.fixture(scope="module")
def vllm_config(demo_checkpoint: Path) -> VllmConfig:
    return make_config(demo_checkpoint, encode_ahead=True)


# -- what is encoded when ---------------------------------------------------------------------


def test_an_image_is_encoded_in_pieces_and_then_its_prompt_is_computed(
    simulation: Simulation,
) -> None:
    add(simulation, picture("a", 200))
    simulation.run()
    assert simulation.kinds[:4] == [("piece",)] * 3 + [("prefill", "a", 0, CHUNK)]
    assert simulation.encoded == ["of a"]


def test_all_images_of_a_prompt_are_encoded_before_its_first_chunk(simulation: Simulation) -> None:
    """A prefill that is under way waits for nothing."""
    images = {"x": (10, 50), "y": (300, 50), "z": (700, 100)}
    add(simulation, make_request("a", 900, images=images))
    simulation.run()
    kinds = [kind[0] for kind in simulation.kinds]
    assert kinds[:9] == ["piece"] * 9
    assert "piece" not in kinds[9:]
    assert simulation.encoded == ["x", "y", "z"]


def test_running_requests_get_a_token_after_each_piece(simulation: Simulation) -> None:
    add(simulation, make_request("text", 40, max_tokens=200))
    steps(simulation, 3)
    add(simulation, *(picture(f"picture-{number}", 300) for number in range(8)))
    simulation.run()
    check_gaps(simulation)
    assert simulation.outputs["text"] == 200


def test_a_text_is_served_while_an_image_is_being_encoded(simulation: Simulation) -> None:
    simulation.pieces = 50
    add(simulation, *(picture(f"picture-{number}") for number in range(50)))
    steps(simulation, 5)
    add(simulation, make_request("text", 40))
    simulation.step()
    assert simulation.kinds[-2:] == [("piece",), ("prefill", "text", 0, 40)]
    assert simulation.outputs == {"text": 1}


def test_a_text_behind_50_images_that_are_encoded_waits_for_two_of_them_at_most(
    simulation: Simulation,
) -> None:
    """The one whose prefill is under way, and one whose turn it is.

    As nothing decodes, pieces delay it by no step.
    """
    long, chunks = MAX_MODEL_LEN - 10, MAX_MODEL_LEN // CHUNK
    add(simulation, *(picture(f"p{number}", long, 10, max_tokens=1) for number in range(50)))
    until(simulation, lambda: simulation.kinds and simulation.kinds[-1][0] == "prefill")
    add(simulation, make_request("text", 40))
    before = len(simulation.kinds)
    until(simulation, lambda: simulation.outputs.get("text"))
    since = [kind for kind in simulation.kinds[before:] if kind[0] != "piece"]
    assert len(since) <= 2 * chunks + 1
    assert len({kind[1] for kind in since if kind[0] == "prefill"}) <= 3


def test_images_are_encoded_although_texts_never_stop_coming(simulation: Simulation) -> None:
    """Also where none of these decodes."""
    add(simulation, picture("a"))
    for number in range(30):
        add(simulation, make_request(f"text-{number}", 40, max_tokens=1, fill=number + 400))
        simulation.step()
    assert simulation.outputs["a"] > 0


def test_a_cached_image_is_not_encoded_again(simulation: Simulation) -> None:
    add(simulation, picture("a"))
    simulation.run()
    other = make_request("b", 120, images={"of a": (30, 50)}, fill=9)
    add(simulation, other)
    simulation.step()
    assert simulation.kinds[-1][:2] == ("prefill", "b")
    simulation.run()
    assert simulation.encoded == ["of a"]


def test_an_image_that_many_want_is_encoded_once(simulation: Simulation) -> None:
    """Also one that a prompt has twice; and of several answers to a prompt each wants it."""
    for number in range(6):
        images = {"x": (10, 50)}
        add(simulation, make_request(f"r{number}", 200, images=images, fill=number + 5))
    twice = make_request("twice", 300, images={"y": (10, 50), "z": (100, 50)})
    twice.mm_features[1].identifier = "y"
    add(simulation, twice)
    simulation.run()
    assert simulation.encoded == ["x", "y"]


def test_what_a_prefix_hit_covers_is_not_encoded(simulation: Simulation) -> None:
    images = {"x": (5, 100), "y": (180, 100)}
    add(simulation, make_request("a", 300, images=images))
    simulation.run()
    add(simulation, make_request("big", 1000, images={"z": (0, 960)}, fill=8))
    simulation.run()
    assert simulation.cached == {"z"}
    add(simulation, make_request("b", 300, images=images))
    simulation.run()
    assert simulation.encoded == ["x", "y", "z", "y"]


def test_with_the_embedding_all_of_them_are(demo_checkpoint: Path) -> None:
    config = make_config(demo_checkpoint, encode_ahead=True, enable_return_mm_embedding=True)
    simulation = Simulation(make_scheduler(config))
    images = {"x": (5, 100), "y": (120, 100)}
    add(simulation, make_request("a", 300, images=images))
    simulation.run()
    add(simulation, make_request("big", 1000, images={"z": (0, 960)}, fill=8))
    simulation.run()
    add(simulation, make_request("b", 300, images=images))
    simulation.run()
    assert simulation.encoded == ["x", "y", "z", "x", "y"]
    assert ("prefill", "b", 256, 300) in simulation.kinds


def test_a_hit_that_is_lost_before_admission_is_made_up_for(simulation: Simulation) -> None:
    """Blocks that covered an image when its request was looked at went to somebody else."""
    images = {"x": (5, 100), "y": (180, 100)}
    add(simulation, make_request("a", 300, images=images))
    simulation.run()
    simulation.scheduler.reset_encoder_cache()
    simulation.cached.clear()
    add(simulation, make_request("b", 300, images=images))
    simulation.step()
    assert list(simulation.asked) == ["y"]
    assert simulation.scheduler.reset_prefix_cache()
    simulation.run()
    assert simulation.encoded[2:] == ["y", "x"]


def test_who_comes_behind_a_lost_hit_keeps_its_place(simulation: Simulation) -> None:
    images = {"x": (5, 100), "y": (180, 100)}
    add(simulation, make_request("a", 300, images=images))
    simulation.run()
    simulation.scheduler.reset_encoder_cache()
    simulation.cached.clear()
    simulation.kinds.clear()
    add(simulation, make_request("b", 300, images=images))
    for name in "cd":
        add(simulation, make_request(name, 200, images={"y": (20, 100)}, fill=ord(name)))
    until(simulation, lambda: "y" in simulation.cached)
    assert simulation.scheduler.reset_prefix_cache()
    simulation.run()
    order = admissions(simulation.kinds)
    assert order.index("c") < order.index("d")


def test_counts_of_runs_and_hits(simulation: Simulation) -> None:
    add(simulation, picture("a"), make_request("b", 200, images={"of a": (10, 50)}, fill=3))
    simulation.run()
    stats: Any = simulation.scheduler.make_stats()
    runs = [(each.encoder_runs, each.encoder_cache_hits) for each in (*simulation.stats, stats)]
    assert [sum(column) for column in zip(*runs, strict=True)] == [1, 1]


def test_all_that_wait_for_images_are_looked_at_a_few_times_a_step(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once more for each of them while a text waits for its grammar."""
    simulation.pieces = 1000
    add(simulation, *(picture(f"p{number}") for number in range(300)))
    blocked = make_request("blocked", 40)
    blocked.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    add(simulation, blocked)
    simulation.step()
    queue = simulation.scheduler.waiting
    assert isinstance(queue, AlternatingQueue)
    is_ready = Mock(side_effect=queue._is_ready)
    monkeypatch.setattr(queue, "_is_ready", is_ready)
    simulation.step()
    assert 0 < is_ready.call_count < 10 * 300


# -- room ----------------------------------------------------------------------------------------


def test_room_is_reserved_for_all_images_of_a_request_or_none(simulation: Simulation) -> None:
    books = simulation.scheduler.encoder_cache_manager
    add(simulation, picture("a", 700, 600))
    add(simulation, make_request("b", 700, images={"x": (0, 300), "y": (300, 300)}, fill=3))
    add(simulation, picture("c", 100, 50))
    simulation.step()
    assert set(books.request_cached_ids) == {"a"}  # nor does c overtake b for ever
    simulation.run()
    assert simulation.encoded == ["of a", "x", "y", "of c"]


def test_a_preempted_request_gets_the_room_that_later_ones_have_reserved(
    simulation: Simulation,
) -> None:
    scheduler = simulation.scheduler
    add(simulation, picture("first", 700, 600, max_tokens=30))
    until(simulation, lambda: simulation.outputs)
    scheduler.reset_encoder_cache()
    simulation.cached.clear()
    simulation.pieces = 20
    add(simulation, picture("second", 700, 600), picture("third", 300, 200))
    simulation.step()
    assert list(simulation.asked) == ["of second", "of third"]
    scheduler.reset_prefix_cache(reset_running_requests=True)
    simulation.step()
    assert list(simulation.asked) == ["of first"]  # nor does the third overtake the second
    assert set(simulation.cancelled) == {"of second", "of third"}
    simulation.run()
    assert set(simulation.outputs.values()) == {30, 4}


def test_requests_of_the_largest_images_are_served_one_by_one(simulation: Simulation) -> None:
    size = MAX_MODEL_LEN - 30
    add(simulation, *(picture(f"r{number}", MAX_MODEL_LEN - 10, size) for number in range(5)))
    simulation.run()
    assert simulation.encoded == [f"of r{number}" for number in range(5)]


def test_an_image_of_which_only_a_tail_without_features_is_left_gets_room_too(
    simulation: Simulation,
) -> None:
    """vLLM wants room for each image that reaches into a chunk, before it looks for features."""
    mask = torch.tensor([True] * 128 + [False] * 2)
    first, again = (
        make_request(name, length, images={"x": (0, 130)})
        for name, length in [("first", 130), ("again", 300)]
    )
    for request in (first, again):
        request.mm_features[0].mm_position = PlaceholderRange(0, 130, mask)
    add(simulation, first)
    simulation.run()
    add(simulation, picture("evicts x", 1000, 960))
    simulation.run()
    add(simulation, again, *(picture(f"p{number}", 400, 330) for number in range(6)))
    simulation.run(limit=400)
    assert ("prefill", "again", 128, 192) in simulation.kinds  # behind a hit of 128


def test_the_bytes_on_their_way_are_bounded(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_reservations, "MAX_BYTES_AHEAD", 1000)
    for number in range(6):
        request = picture(f"r{number}")
        give_pixels(request)
        add(simulation, request)
    most = 0
    while simulation.scheduler.has_unfinished_requests():
        simulation.step()
        most = max(most, len(simulation.asked))
    assert most == 2  # of 400 bytes each
    assert len(simulation.encoded) == 6


# -- requests that go away, and faults -----------------------------------------------------------


def test_the_images_of_an_aborted_request_leave_the_queue(simulation: Simulation) -> None:
    """But for those that somebody else wants."""
    simulation.pieces = 10
    add(simulation, make_request("a", 300, images={"x": (0, 50), "y": (60, 50)}))
    add(simulation, make_request("b", 300, images={"y": (0, 50)}, fill=3))
    simulation.step()
    simulation.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    simulation.step()
    assert simulation.cancelled == ["x"]
    simulation.run()
    assert simulation.encoded == ["y"]
    add(simulation, make_request("c", 300, images={"x": (0, 50)}, fill=4))
    simulation.run()
    assert simulation.encoded == ["y", "x"]


def test_what_comes_and_goes_between_two_steps_is_never_asked_for(simulation: Simulation) -> None:
    add(simulation, picture("a"))
    simulation.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    simulation.step()
    assert not simulation.asked
    assert not simulation.cancelled
    simulation.run()


@pytest.mark.parametrize("aborted", [False, True], ids=["", "aborted meanwhile"])
def test_an_image_that_cannot_be_encoded_fails_who_wants_it(
    simulation: Simulation, aborted: bool
) -> None:
    simulation.faults = {"y": "could not be encoded: ValueError: no"}
    add(simulation, make_request("text", 40, max_tokens=30))
    add(simulation, make_request("a", 300, images={"x": (0, 50), "y": (60, 50)}, fill=2))
    add(simulation, make_request("b", 300, images={"y": (0, 50)}, fill=3))
    add(simulation, make_request("c", 300, images={"z": (0, 50)}, fill=4))
    until(simulation, lambda: "x" in simulation.encoded)
    if aborted:
        simulation.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    simulation.run()
    sentence = "of the request could not be encoded: ValueError: no"
    failed = {"a": f"image 2 {sentence}", "b": f"image 1 {sentence}"}
    if aborted:
        del failed["a"]
    assert simulation.reasons == failed
    assert {name: simulation.outputs[name] for name in ("text", "c")} == {"text": 30, "c": 4}
    simulation.faults.clear()
    add(simulation, make_request("again", 300, images={"y": (0, 50)}, fill=5))
    simulation.run()
    assert simulation.encoded == ["x", "z", "y"]


def test_the_worker_forgets_an_image_that_was_evicted_and_asked_for_anew_in_vain(
    simulation: Simulation,
) -> None:
    """It has the features of x still, since vLLM does not tell it of images that came back."""
    add(simulation, picture("x", 400, 300))
    simulation.run()
    add(simulation, picture("z", 300, 200))
    simulation.run()
    simulation.pieces = 10
    images = {"of x": (0, 300)}
    add(simulation, picture("large", 700, 600), make_request("b", 400, images=images, fill=3))
    simulation.step()
    assert list(simulation.asked) == ["of large", "of x"]
    simulation.scheduler.finish_requests("b", RequestStatus.FINISHED_ABORTED)
    simulation.run()
    assert simulation.cached == {"of large"}


def test_a_refused_request_takes_no_room_from_others(simulation: Simulation) -> None:
    add(simulation, picture("a"))
    simulation.run()
    simulation.pieces = 10
    add(simulation, picture("b"))
    simulation.step()
    add(simulation, make_request("refused", 100, images={"of a": (0, 60)}, fill=3))
    simulation.run()
    assert not simulation.outputs["refused"]
    assert simulation.outputs["b"] == 4
    assert not simulation.cancelled


def test_an_identifier_of_two_images_fails_the_second_request(simulation: Simulation) -> None:
    add(simulation, make_request("a", 100, images={"x": (0, 50)}))
    add(simulation, make_request("b", 100, images={"x": (0, 60)}, fill=3))
    simulation.run()
    assert simulation.outputs["a"] == 4
    assert not simulation.outputs["b"]


# -- the engine's state --------------------------------------------------------------------------


def test_all_is_asked_for_anew_when_the_cache_is_emptied(simulation: Simulation) -> None:
    """Also for a request in the middle of its prefill, which makes way for others."""
    add(simulation, make_request("text", 40, max_tokens=100))
    add(simulation, make_request("a", 900, images={"x": (0, 50), "y": (700, 100)}, fill=2))
    until(simulation, lambda: any(kind[:2] == ("prefill", "a") for kind in simulation.kinds))
    add(simulation, picture("b"))
    simulation.step()
    simulation.scheduler.reset_encoder_cache()
    simulation.cached.clear()
    simulation.run()
    check_gaps(simulation)
    assert sorted(simulation.encoded) == ["of b", "x", "y", "y"]


def test_nothing_is_asked_for_while_the_engine_pauses(simulation: Simulation) -> None:
    simulation.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    add(simulation, picture("a"))
    simulation.step()
    assert not simulation.asked
    simulation.scheduler.set_pause_state(PauseState.UNPAUSED)
    simulation.run()


def test_a_step_without_images_has_vllms_message(simulation: Simulation) -> None:
    add(simulation, make_request("text", 40))
    assert not isinstance(simulation.scheduler.schedule(), SpyreSchedulerOutput)

# SPDX-License-Identifier: Apache-2.0
"""When an image is encoded, and what a failed encoding leaves."""

from pathlib import Path

import pytest
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from tests.scheduler.simulation import (
    Simulation,
    make_config,
    make_request,
    make_scheduler,
    run,
    steps,
)
from vllm_spyre_mm.scheduler.outputs import FailedEncoding, SpyreModelRunnerOutput
from vllm_spyre_mm.scheduler.scheduler import SpyreScheduler

pytestmark = pytest.mark.usefixtures("no_blocks_left")


def test_an_image_is_encoded_once_at_the_first_chunk_that_needs_it(
    scheduler: SpyreScheduler,
) -> None:
    images = {"x": (10, 200), "y": (260, 30)}
    scheduler.add_request(make_request("a", 300, images=images))
    simulation = Simulation(scheduler)
    simulation.step()
    assert simulation.encoded == ["x"]
    simulation.run()
    assert simulation.encoded == ["x", "y"]
    # Another prompt with one of them: its features are still cached.
    other = run(scheduler, make_request("b", 280, images={"y": (20, 30)}, fill=9))
    assert other.encoded == []


def test_a_full_prefix_hit_encodes_evicted_images_once(scheduler: SpyreScheduler) -> None:
    """The embedding is wanted: cached images are referenced, evicted ones encoded, hits kept."""
    images = {"x": (5, 100), "y": (120, 100)}
    run(scheduler, make_request("a", 300, images=images))
    again = run(scheduler, make_request("b", 300, images=images))
    assert again.encoded == []
    assert again.kinds[0] == ("prefill", "b", 256, 300)
    cache = scheduler.encoder_cache_manager
    run(scheduler, make_request("c", 950, images={"z": (0, 900)}, fill=8))
    assert "x" not in cache.cached
    third = run(scheduler, make_request("d", 300, images=images))
    assert third.encoded == ["x", "y"]
    assert third.kinds[0] == ("prefill", "d", 256, 300)


def test_without_the_embedding_a_covered_image_is_not_encoded(demo_checkpoint: Path) -> None:
    scheduler = make_scheduler(make_config(demo_checkpoint))
    images = {"x": (5, 100)}
    run(scheduler, make_request("a", 300, images=images))
    run(scheduler, make_request("c", 1000, images={"z": (0, 960)}, fill=8))
    again = run(scheduler, make_request("b", 300, images=images))
    assert again.encoded == []


def test_two_maximal_images_in_one_prompt(scheduler: SpyreScheduler) -> None:
    """They fill the encoder cache; a third request that needs the room evicts both."""
    run(scheduler, make_request("a", 1000, images={"x": (0, 500), "y": (500, 490)}))
    assert set(scheduler.encoder_cache_manager.cached) == {"x", "y"}
    simulation = run(scheduler, make_request("b", 1000, images={"z": (0, 900)}, fill=8))
    assert simulation.encoded == ["z"]
    assert set(scheduler.encoder_cache_manager.cached) == {"z"}


def test_an_image_that_does_not_fit_makes_its_request_wait(scheduler: SpyreScheduler) -> None:
    """No chunk ends in the middle of a block, and no reference is left behind."""
    cache = scheduler.encoder_cache_manager
    blocker = make_request("blocker", 900, images={"big": (0, 800)}, fill=5)
    cache.allocate(blocker, 0)  # as if a request in the middle of its prefill held it
    scheduler.add_request(make_request("a", 600, images={"x": (70, 500)}))
    simulation = Simulation(scheduler)
    steps(simulation, 3)
    # The first chunk needs the image at 70, so nothing at all is computed.
    assert simulation.kinds == []
    assert not cache.request_cached_ids.get("a")
    cache.free(blocker)
    simulation.run()


def test_an_image_that_does_not_fit_is_not_overtaken_by_those_that_do(
    scheduler: SpyreScheduler,
) -> None:
    """Any number of smaller ones would take the room that it waits for."""
    cache = scheduler.encoder_cache_manager
    blocker = make_request("blocker", 900, images={"big": (0, 800)}, fill=5)
    cache.allocate(blocker, 0)  # as if a request in the middle of its prefill held it
    scheduler.add_request(make_request("large", 600, images={"x": (0, 500)}))
    for number in range(5):
        images = {f"small-{number}": (0, 100)}
        scheduler.add_request(make_request(f"small-{number}", 120, images=images, fill=30 + number))
    simulation = Simulation(scheduler)
    steps(simulation, 20)
    assert simulation.encoded == []
    cache.free(blocker)
    simulation.run()
    assert simulation.encoded == ["x", *(f"small-{number}" for number in range(5))]


@pytest.mark.parametrize("aborted", [False, True], ids=["", "aborted meanwhile"])
def test_a_step_whose_images_could_not_be_encoded_fails_its_request_alone(
    scheduler: SpyreScheduler, aborted: bool
) -> None:
    """Nothing of the step is offered to later requests: neither blocks nor images."""
    scheduler.add_request(make_request("other", 100, max_tokens=30, fill=5))
    simulation = Simulation(scheduler)
    simulation.step()
    images = {"x": (10, 50), "y": (200, 50)}
    scheduler.add_request(make_request("a", 300, images=images))
    simulation.step()
    assert simulation.kinds[-1] == ("decode", ("other",))
    output = scheduler.schedule()
    (state,) = output.scheduled_new_reqs
    assert output.scheduled_encoder_inputs == {"a": [0]}
    failed = SpyreModelRunnerOutput(
        req_ids=["a"],
        req_id_to_index={"a": 0},
        sampled_token_ids=[[]],
        failed_encoding=FailedEncoding("a", "because", ["x"], state.block_ids[0]),
    )
    if aborted:
        scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    outputs = scheduler.update_from_output(output, failed)[0].outputs
    if not aborted:
        (ended,) = outputs
        assert (ended.request_id, ended.stop_reason) == ("a", "because")
        assert ended.finish_reason == FinishReason.ERROR
    books = scheduler.encoder_cache_manager
    assert not books.cached
    assert books.num_free_slots == books.num_freeable_slots == books.cache_size
    simulation.run()
    assert simulation.outputs["other"] == 30
    again = run(scheduler, make_request("b", 300, images=images))
    assert again.encoded == ["x", "y"]
    assert again.kinds[0] == ("prefill", "b", 0, 64)


def test_the_chunks_before_a_failed_one_stay_in_the_prefix_cache(
    scheduler: SpyreScheduler,
) -> None:
    images = {"x": (10, 50), "y": (200, 50)}
    scheduler.add_request(make_request("a", 300, images=images))
    simulation = Simulation(scheduler)
    simulation.step()
    simulation.step()
    blocks = scheduler.kv_cache_manager.get_block_ids("a")[0]
    output = scheduler.schedule()
    assert output.scheduled_encoder_inputs == {"a": [1]}
    more = output.scheduled_cached_reqs.new_block_ids[0]
    assert more is not None
    failed = SpyreModelRunnerOutput(
        req_ids=["a"],
        req_id_to_index={"a": 0},
        sampled_token_ids=[[]],
        failed_encoding=FailedEncoding("a", "because", ["y"], [*blocks[3:], *more[0]]),
    )
    scheduler.update_from_output(output, failed)
    assert set(scheduler.encoder_cache_manager.cached) == {"x"}
    again = run(scheduler, make_request("b", 300, images=images))
    assert again.encoded == ["y"]
    assert again.kinds[0] == ("prefill", "b", 192, 300)

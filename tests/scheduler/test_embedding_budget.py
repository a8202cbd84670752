# SPDX-License-Identifier: Apache-2.0
"""What is held, encoded and returned, on vLLM's real scheduler with a pretended model."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from vllm.config import VllmConfig
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.v1.request import RequestStatus

from tests.scheduler.simulation import (
    Simulation,
    admissions,
    make_request,
    make_scheduler,
    run,
    steps,
    until,
)
from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.scheduler.embedding_budget import EmbeddingBudget
from vllm_spyre_mm.scheduler.outputs import SpyreModelRunnerOutput
from vllm_spyre_mm.scheduler.scheduler import SpyreScheduler

ROWS = 100
ROW_BYTES = 256 * 4  # fp32


@pytest.fixture(params=[False, True], ids=["in steps", "ahead"])
def vllm_config(
    vllm_config: VllmConfig, vllm_config_ahead: VllmConfig, request: pytest.FixtureRequest
) -> VllmConfig:
    """Of an engine that encodes images in the steps that need them, or ahead of time."""
    return vllm_config_ahead if request.param else vllm_config


with_a_connector = pytest.mark.parametrize("vllm_config", [False], ids=["in steps"], indirect=True)
"""Beside an EC connector nothing is encoded ahead."""


def bounded(vllm_config: VllmConfig, max_held: int, **changes: Any) -> SpyreScheduler:
    scheduler = make_scheduler(vllm_config)
    settings = SpyreSettings.from_vllm_config(vllm_config)
    scheduler._embedding_budget = EmbeddingBudget(
        settings.model_copy(update={"max_held_mm_embedding_bytes": max_held, **changes}),
        vllm_config.model_config,
    )
    return scheduler


def with_image(name: str, image: str | None = None, **more: Any) -> Any:
    request = make_request(name, 128, images={image or name: (5, ROWS)}, max_tokens=20, **more)
    assert request.sampling_params is not None
    request.sampling_params.extra_args = {"return_mm_embedding": {"dtype": "float32"}}
    return request


def beside_one_that_runs(vllm_config: VllmConfig) -> Simulation:
    """A request runs whose embedding takes all that the bound allows."""
    scheduler = bounded(vllm_config, ROWS * ROW_BYTES)
    scheduler.add_request(with_image("running"))
    simulation = Simulation(scheduler)
    until(simulation, lambda: scheduler.running)
    return simulation


def run_counting(simulation: Simulation, bound: int) -> int:
    """Run to the end; the largest number of requests that held an embedding at once."""
    scheduler, most = simulation.scheduler, 0
    while scheduler.has_unfinished_requests():
        simulation.step()
        held = scheduler._embedding_budget.held(scheduler.requests)
        assert held <= bound
        most = max(most, held // (ROWS * ROW_BYTES))
    simulation.check_nothing_is_held()
    assert scheduler._embedding_budget.held(scheduler.requests) == 0
    return most


@pytest.mark.parametrize(("bound", "at_once"), [(1, 1), (2, 2), (2.9, 2), (100, 4)])
def test_requests_wait_at_the_bound_and_all_are_served(
    vllm_config: VllmConfig, bound: float, at_once: int
) -> None:
    max_held = int(bound * ROWS * ROW_BYTES)
    scheduler = bounded(vllm_config, max_held)
    for name in "abcdef":
        scheduler.add_request(with_image(name, fill=ord(name)))
    assert run_counting(Simulation(scheduler), max_held) == at_once


def test_text_holds_nothing_and_is_not_kept_waiting_by_what_is_held(
    vllm_config: VllmConfig,
) -> None:
    scheduler = bounded(vllm_config, ROWS * ROW_BYTES)
    scheduler.add_request(with_image("picture"))
    scheduler.add_request(make_request("text", 70, fill=9, max_tokens=20))
    until(Simulation(scheduler), lambda: len(scheduler.running) == 2)


def test_a_request_that_waits_for_its_grammar_does_not_let_another_exceed_the_bound(
    vllm_config: VllmConfig,
) -> None:
    """vLLM passes over the first one, and the second would be admitted in its place."""
    simulation = beside_one_that_runs(vllm_config)
    scheduler = simulation.scheduler
    blocked = make_request("blocked", 70, fill=9)
    blocked.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    scheduler.add_request(blocked)
    scheduler.add_request(with_image("next", fill=8))
    steps(simulation, 8)
    assert [request.request_id for request in scheduler.running] == ["running"]
    scheduler.finish_requests("blocked", RequestStatus.FINISHED_ABORTED)
    simulation.run()


def test_a_request_whose_features_are_in_transit_does_not_let_another_exceed_the_bound(
    vllm_config: VllmConfig,
) -> None:
    """Nor does it hold up those that have room."""
    simulation = beside_one_that_runs(vllm_config)
    scheduler = simulation.scheduler
    scheduler.ec_connector = Mock(
        ensure_cache_available=lambda request, _: request.request_id != "late",
        has_cache_item=lambda _: False,
        request_finished=lambda _: (False, None),
        take_unavailable_requests=set,
    )
    scheduler.add_request(make_request("late", 70, images={"late": (5, 10)}, fill=9))
    scheduler.requests["late"].sampling_params.extra_args = {"return_mm_embedding": False}
    scheduler.add_request(with_image("next", fill=8))
    steps(simulation, 10)
    assert [request.request_id for request in scheduler.running] == ["running"]
    until(simulation, lambda: "next" in simulation.outputs)
    scheduler.finish_requests("late", RequestStatus.FINISHED_ABORTED)
    simulation.run()


def test_the_bound_is_asked_of_the_request_that_is_taken(vllm_config: VllmConfig) -> None:
    """It is the images' turn, the first one may not be encoded yet, and the second is."""
    bound = 3 * ROWS * ROW_BYTES // 2
    scheduler = bounded(vllm_config, bound)
    scheduler.add_request(with_image("running"))
    scheduler.add_request(make_request("text-0", 70, max_tokens=20, fill=9))
    simulation = Simulation(scheduler)
    until(simulation, lambda: len(scheduler.running) == 2)
    if simulation.kinds[-1][1] == "running":
        scheduler.add_request(make_request("text-1", 70, max_tokens=20, fill=6))
        until(simulation, lambda: len(scheduler.running) == 3)
    scheduler.add_request(with_image("unlike", fill=7))
    scheduler.add_request(with_image("again", "running", fill=8))
    scheduler.add_request(make_request("text-2", 70, fill=5))
    run_counting(simulation, bound)


def test_an_aborted_request_gives_its_room_back(vllm_config: VllmConfig) -> None:
    scheduler = bounded(vllm_config, ROWS * ROW_BYTES)
    for name in "ab":
        scheduler.add_request(with_image(name, fill=ord(name)))
    simulation = Simulation(scheduler)
    steps(simulation, 8)
    assert admissions(simulation.kinds) == ["a"]
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    simulation.step()
    assert simulation.kinds[-1][:2] == ("prefill", "b")
    simulation.run()


def note_counts(scheduler: SpyreScheduler) -> list[tuple[int, int]]:
    """Runs of the encoder and hits of its cache, of each step from now on."""
    counts: list[tuple[int, int]] = []
    extend = scheduler._embedding_budget.extend

    def note(*args: Any) -> Any:
        stats = extend(*args)
        counts.append((stats.encoder_runs, stats.encoder_cache_hits))
        return stats

    scheduler._embedding_budget.extend = note  # type: ignore[method-assign]
    return counts


def test_each_image_is_a_run_or_a_hit_once(vllm_config: VllmConfig) -> None:
    """Also where it spans chunks, or where the prefix cache covers it."""
    scheduler = bounded(vllm_config, 1 << 30)
    images = {"x": (10, 200), "y": (260, 30)}
    simulation = Simulation(scheduler)
    scheduler.add_request(make_request("a", 300, images=images))
    counts = note_counts(scheduler)

    def total() -> tuple[int, int]:
        sums = (sum(runs for runs, _ in counts), sum(hits for _, hits in counts))
        counts.clear()
        return sums

    simulation.run()
    assert total() == (2, 0)
    run(scheduler, make_request("covered and collected", 300, images=images))
    assert total() == (0, 2)
    run(scheduler, make_request("another prompt", 280, images={"y": (20, 30)}, fill=9))
    assert total() == (0, 1)
    run(scheduler, make_request("the same twice", 300, images={"z": (0, 90)}, fill=4))
    assert total() == (1, 0)
    unwanted = make_request("covered, not collected", 300, images=images)
    assert unwanted.sampling_params is not None
    unwanted.sampling_params.extra_args = {"return_mm_embedding": False}
    run(scheduler, unwanted)
    # The prefix cache has four whole blocks, and x lies within them; y reaches beyond.
    assert total() == (0, 1)


@with_a_connector
def test_what_is_asked_of_an_engine_without_an_encoder_is_no_run(vllm_config: VllmConfig) -> None:
    """The request is refused, whether or not the scheduler knew that there are no features."""
    scheduler = bounded(vllm_config, 1 << 30, missing_features="refuse")
    counts = note_counts(scheduler)
    run(scheduler, make_request("a", 128, images={"x": (5, 50)}))
    assert not any(map(any, counts))


@with_a_connector
def test_what_a_connector_did_not_bring_is_a_run_and_no_hit(vllm_config: VllmConfig) -> None:
    scheduler = bounded(vllm_config, 1 << 30)
    counts, images = note_counts(scheduler), {"x": (5, 50), "y": (60, 30)}
    run(scheduler, make_request("a", 128, images=images))
    counts.clear()
    scheduler.add_request(make_request("b", 128, images=images, fill=9))
    output = scheduler.schedule()
    sampled = SpyreModelRunnerOutput(
        req_ids=["b"], req_id_to_index={"b": 0}, sampled_token_ids=[[1]], num_encoded_anew=1
    )
    scheduler.update_from_output(output, sampled)
    assert counts == [(1, 1)]


def test_an_image_is_counted_where_its_first_feature_is(vllm_config: VllmConfig) -> None:
    """Its placeholder begins in the first chunk, its features in the second: one run, no hit."""
    scheduler = bounded(vllm_config, 1 << 30)
    request = make_request("a", 256, images={"x": (100, 60)})
    (feature,) = request.mm_features
    mask = torch.tensor([False] * 40 + [True] * 20)
    feature.mm_position = PlaceholderRange(100, 60, mask)
    counts = note_counts(scheduler)
    simulation = run(scheduler, request)
    chunks = [kind for kind in simulation.kinds if kind[0] == "prefill"]
    assert chunks[0] == ("prefill", "a", 0, 128)
    assert [each for each in counts if each != (0, 0)] == [(1, 0)]
    if ("piece",) not in simulation.kinds:
        assert counts[1] == (1, 0)


@pytest.mark.parametrize("modality", ["image", "video"])
def test_given_features_are_neither_runs_nor_hits(vllm_config: VllmConfig, modality: str) -> None:
    scheduler = bounded(vllm_config, 1 << 30)
    counts = note_counts(scheduler)
    for name in "ab":
        request = make_request(name, 128, images={"x": (5, 50)}, fill=ord(name))
        (feature,) = request.mm_features
        rows = MultiModalFieldElem(data=torch.ones(50, 4), field=MultiModalBatchedField())
        feature.modality = modality
        feature.data = MultiModalKwargsItem({f"{modality}_embeds": rows})
        run(scheduler, request)
    assert set(counts) == {(0, 0)}

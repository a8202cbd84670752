# SPDX-License-Identifier: Apache-2.0
"""Which step comes next, and who takes part in it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from tests.scheduler.simulation import (
    MAX_MODEL_LEN,
    Simulation,
    make_request,
    make_scheduler,
    run,
)
from vllm_spyre_mm.scheduler.scheduler import SpyreScheduler
from vllm_spyre_mm.upstream.contract import UnsupportedVllmError

pytestmark = pytest.mark.usefixtures("no_blocks_left")


def test_a_prompt_is_prefilled_on_the_grid_that_its_end_anchors(scheduler: SpyreScheduler) -> None:
    """300 tokens are 5 blocks: one block of padding, then 64, 128 and the rest."""
    simulation = run(scheduler, make_request("a", 300))
    assert simulation.kinds[:3] == [
        ("prefill", "a", 0, 64),
        ("prefill", "a", 64, 192),
        ("prefill", "a", 192, 300),
    ]
    assert simulation.outputs == {"a": 4}


def test_prefill_and_decode_alternate(scheduler: SpyreScheduler) -> None:
    scheduler.add_request(make_request("old", 64, max_tokens=12))
    simulation = Simulation(scheduler)
    simulation.step()
    scheduler.add_request(make_request("new", 512, fill=8))
    simulation.run()
    kinds = [kind[0] for kind in simulation.kinds[:9]]
    assert kinds == ["prefill", "decode", *["prefill", "decode"] * 3, "prefill"]


def test_no_step_is_spent_on_requests_for_which_there_is_no_place(
    scheduler: SpyreScheduler,
) -> None:
    """Four rows are taken; the fifth request would fit by its length."""
    for name in "abcde":
        scheduler.add_request(make_request(name, 64, max_tokens=12, fill=ord(name)))
    simulation = Simulation(scheduler)
    while scheduler.waiting:
        assert simulation.step()
    simulation.run()


def test_for_a_card_a_prefix_hit_is_rounded_down_to_the_grid(scheduler: SpyreScheduler) -> None:
    scheduler.geometry = dataclasses.replace(scheduler.geometry, whole_chunks=True)
    first = run(scheduler, make_request("a", 300))
    assert len([kind for kind in first.kinds if kind[0] == "prefill"]) == 3
    again = run(scheduler, make_request("b", 300))
    # 4 whole blocks (256 tokens) are cached; the last chunk, from 192, is computed.
    assert [kind for kind in again.kinds if kind[0] == "prefill"] == [("prefill", "b", 192, 300)]
    longer = run(scheduler, make_request("c", 400))
    # Another grid: 7 blocks, so chunks begin at 64, 192 and 320; the hit of 256 becomes 192.
    assert longer.kinds[0] == ("prefill", "c", 192, 320)


def test_on_a_cpu_a_prefill_goes_on_after_the_last_cached_block(scheduler: SpyreScheduler) -> None:
    run(scheduler, make_request("a", 300))
    again = run(scheduler, make_request("b", 300))
    assert [kind for kind in again.kinds if kind[0] == "prefill"] == [("prefill", "b", 256, 300)]
    longer = run(scheduler, make_request("c", 400))
    assert [kind for kind in longer.kinds if kind[0] == "prefill"] == [
        ("prefill", "c", 256, 320),
        ("prefill", "c", 320, 400),
    ]


def test_the_bound_on_batch_and_length_pauses_and_lets_the_oldest_go_on(
    scheduler: SpyreScheduler,
) -> None:
    """Four requests that grow: 4 × 512 fits, 4 × 576 does not."""
    requests = [make_request(f"r{i}", 450, max_tokens=200, fill=20 + i) for i in range(4)]
    simulation = run(scheduler, *requests)
    assert simulation.outputs == {f"r{i}": 200 for i in range(4)}
    sizes = [len(kind[1]) for kind in simulation.kinds if kind[0] == "decode"]
    assert max(sizes) == 4
    assert {3, 4} <= set(sizes)


def test_a_lone_request_at_the_limit_finishes(scheduler: SpyreScheduler) -> None:
    simulation = run(scheduler, make_request("a", MAX_MODEL_LEN - 3, max_tokens=100))
    assert simulation.outputs == {"a": 3}


@pytest.mark.parametrize("state", [PauseState.PAUSED_NEW, PauseState.PAUSED_ALL])
def test_while_paused_no_step_is_spent_on_requests_that_wait(
    scheduler: SpyreScheduler, state: PauseState
) -> None:
    """What runs goes on at full speed, or not at all; what waits is served afterwards."""
    scheduler.add_request(make_request("runs", 64, max_tokens=30))
    simulation = Simulation(scheduler)
    simulation.step()
    scheduler.add_request(make_request("waits", 64, fill=8))
    scheduler.set_pause_state(state)
    steps = [simulation.step() for _ in range(10)]
    assert steps == [state == PauseState.PAUSED_NEW] * 10
    scheduler.set_pause_state(PauseState.UNPAUSED)
    simulation.run()
    assert simulation.outputs == {"runs": 30, "waits": 4}


def test_the_watermark_keeps_blocks_free_for_those_that_run(vllm_config: VllmConfig) -> None:
    """Of 40 blocks 10 are kept; a request that would take some of them waits unless it is alone."""
    vllm_config.scheduler_config.watermark = 0.25
    try:
        scheduler = make_scheduler(vllm_config, num_blocks=40)
    finally:
        vllm_config.scheduler_config.watermark = 0.0
    scheduler.add_request(make_request("alone", 1000, max_tokens=20, fill=5))
    scheduler.add_request(make_request("waits", 1000, max_tokens=20, fill=6))
    simulation = Simulation(scheduler)
    for _ in range(20):
        simulation.step()
    assert [request.request_id for request in scheduler.running] == ["alone"]
    simulation.run()
    assert not simulation.preempted


def test_a_step_that_can_admit_nobody_decodes(make: Callable[..., SpyreScheduler]) -> None:
    """The cache has no room for ``waits`` until ``runs`` is done. Its end is told to the worker."""
    scheduler = make(num_blocks=18, bound=2048)
    scheduler.add_request(make_request("short", 64, max_tokens=8, fill=4))
    scheduler.add_request(make_request("runs", 600, max_tokens=60, fill=5))
    scheduler.add_request(make_request("waits", 600, fill=6))
    simulation = Simulation(scheduler).run()
    assert simulation.outputs == {"short": 8, "runs": 60, "waits": 4}
    assert "short" in simulation.ended


def test_queues_are_restored_when_scheduling_fails(
    scheduler: SpyreScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        scheduler.add_request(make_request(f"r{i}", 100, max_tokens=50, fill=40 + i))
    simulation = Simulation(scheduler)
    for _ in range(5):
        simulation.step()
    running, limit = list(scheduler.running), scheduler.max_num_active_reqs

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no blocks today")

    with monkeypatch.context() as patch:
        patch.setattr(scheduler.kv_cache_manager, "allocate_slots", fail)
        with pytest.raises(RuntimeError, match="no blocks today"):
            scheduler.schedule()
    assert scheduler.running == running
    assert scheduler.max_num_active_reqs == limit
    simulation.run()


def test_an_abort_between_chunks_frees_everything(scheduler: SpyreScheduler) -> None:
    scheduler.add_request(make_request("a", 900, images={"x": (0, 500)}))
    simulation = Simulation(scheduler)
    simulation.step()
    simulation.step()
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    simulation.check_nothing_is_held()


@pytest.mark.parametrize(
    "name",
    [
        "_get_local_prefix_cache_hit",
        "_reserve_prefill_lookahead",
        "_try_schedule_encoder_inputs",
    ],
)
def test_a_scheduler_that_would_not_ask_is_refused_by_name(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An override that vLLM never calls would let a chunk leave the grid without an error."""
    monkeypatch.delattr(Scheduler, name)
    with pytest.raises(UnsupportedVllmError, match=f"Scheduler has no '{name}'"):
        make_scheduler(vllm_config)

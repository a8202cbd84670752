# SPDX-License-Identifier: Apache-2.0
"""The scheduler's rules, on vLLM's real scheduler with a model that is only pretended.

Every scenario is driven to its end by :class:`Simulation`, which checks each step against the
rules that hold for all of them.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.config.scheduler import SchedulerPolicy
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.scheduler.outputs import FailedEncoding, SpyreModelRunnerOutput
from vllm_spyre_mm.scheduler.scheduler import SpyreScheduler
from vllm_spyre_mm.upstream.contract import UnsupportedVllmError

CHUNK = 128
BLOCK = 64
MAX_MODEL_LEN = 1024


def make_config(checkpoint: Path, **arguments: Any) -> VllmConfig:
    """Of an engine with small chunks and four rows."""
    return EngineArgs(
        model=str(checkpoint),
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=4,
        enforce_eager=True,
        **arguments,
    ).create_engine_config()


@pytest.fixture(scope="module")
def vllm_config(demo_checkpoint: Path) -> VllmConfig:
    return make_config(
        demo_checkpoint, enable_return_mm_embedding=True, additional_config={"max_batch_tkv": 2048}
    )


def make_scheduler(vllm_config: VllmConfig, num_blocks: int = 100) -> SpyreScheduler:
    vllm_config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    return SpyreScheduler(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
        log_stats=True,
    )


@pytest.fixture(scope="module")
def make(vllm_config: VllmConfig) -> Callable[..., SpyreScheduler]:
    """Makes a scheduler of a size, a bound on batch × length, and a policy.

    (A function, because Hypothesis cannot print a configuration.)
    """

    def make(num_blocks: int, bound: int, policy: SchedulerPolicy = "fcfs") -> SpyreScheduler:
        vllm_config.scheduler_config.policy = policy
        try:
            scheduler = make_scheduler(vllm_config, num_blocks)
        finally:
            vllm_config.scheduler_config.policy = "fcfs"
        scheduler.geometry = dataclasses.replace(scheduler.geometry, max_batch_tkv=bound)
        return scheduler

    return make


@pytest.fixture
def scheduler(vllm_config: VllmConfig) -> SpyreScheduler:
    return make_scheduler(vllm_config)


def make_request(
    name: str,
    num_tokens: int,
    *,
    images: dict[str, tuple[int, int]] | None = None,
    max_tokens: int = 4,
    fill: int = 7,
) -> Request:
    """A request whose prompt is ``fill`` repeated; images by identifier: (offset, length)."""
    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    return Request(
        request_id=name,
        prompt_token_ids=[fill] * num_tokens,
        sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        pooling_params=None,
        mm_features=[
            MultiModalFeatureSpec(
                data=None,
                modality="image",
                identifier=identifier,
                mm_position=PlaceholderRange(offset, length),
            )
            for identifier, (offset, length) in (images or {}).items()
        ],
        block_hasher=get_request_block_hasher(BLOCK, hash_function),
    )


@dataclass
class Simulation:
    """Runs a scheduler with a pretended model, and checks every step.

    Attributes:
        kinds: for each step that did something, ``("prefill", name, start, end)`` or
            ``("decode", names)``.
        preempted: names in the order in which they lost their blocks.
        encoded: identifiers in the order in which they were to be encoded.
        outputs: number of tokens that each request got.
        ended: names of finished requests of which the worker was told.
    """

    scheduler: SpyreScheduler
    kinds: list[tuple[Any, ...]] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    encoded: list[str] = field(default_factory=list)
    outputs: dict[str, int] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    def step(self) -> bool:
        """One step; False if nothing was scheduled."""
        scheduler = self.scheduler
        ranked = self._ranked()
        names = [name for name, _ in ranked]
        output = scheduler.schedule()
        scheduled = output.num_scheduled_tokens
        self.ended |= output.finished_req_ids
        for name, items in output.scheduled_encoder_inputs.items():
            features = scheduler.requests[name].mm_features
            self.encoded += [features[item].identifier for item in items]
        admitted = {data.req_id for data in output.scheduled_new_reqs}
        admitted |= output.scheduled_cached_reqs.resumed_req_ids
        for data in output.scheduled_new_reqs:
            assert data.mm_features == scheduler.requests[data.req_id].mm_features
        order = [request.request_id for request in scheduler.running]
        assert [name for name in order if name in names] == [
            name for name in names if name in order
        ], "the order of running requests changed"
        requests = [scheduler.requests[name] for name in scheduled]
        decoded = self._check_kind(requests, scheduled, admitted)
        self._check_victims(ranked, order, decoded)
        assert scheduled or not names or scheduler.pause_state == PauseState.PAUSED_ALL, (
            "a step was empty although requests run"
        )
        tokens = [
            [3] if request.num_computed_tokens >= request.num_tokens else [] for request in requests
        ]
        results = scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=list(scheduled),
                req_id_to_index={name: row for row, name in enumerate(scheduled)},
                sampled_token_ids=tokens,
            ),
        )
        for client in results.values():
            for result in client.outputs:
                count = self.outputs.get(result.request_id, 0) + len(result.new_token_ids)
                self.outputs[result.request_id] = count
        return bool(scheduled)

    def _check_kind(
        self, requests: list[Request], scheduled: dict[str, int], admitted: set[str]
    ) -> tuple[str, ...]:
        """Note what kind of step it was; returns the names of those that decoded."""
        geometry = self.scheduler.geometry
        if not requests:
            return ()
        starts = [
            request.num_computed_tokens - scheduled[request.request_id] for request in requests
        ]
        decode = all(
            start == request.num_tokens - 1 and request.num_output_tokens > 0
            for start, request in zip(starts, requests, strict=True)
        ) and not (admitted & scheduled.keys())
        if decode:
            rows = [geometry.num_blocks(request.num_tokens) * BLOCK for request in requests]
            assert len(rows) * max(rows) <= geometry.max_batch_tkv
            self.kinds.append(("decode", tuple(scheduled)))
            return tuple(scheduled)
        assert len(requests) == 1, "a prefill has a step of its own"
        (request,), (start,) = requests, starts
        end = start + scheduled[request.request_id]
        padding = geometry.left_padding(request.num_tokens)
        assert start % BLOCK == 0
        assert not geometry.whole_chunks or start == 0 or (start + padding) % CHUNK == 0
        assert end == geometry.chunk_end(request.num_tokens, start)
        self.kinds.append(("prefill", request.request_id, start, end))
        return ()

    def _ranked(self) -> list[tuple[str, bool]]:
        """The running requests in the order in which none loses its blocks before a later one.

        Each with whether it decodes.
        """
        running = self.scheduler.running
        if self.scheduler.policy == SchedulingPolicy.PRIORITY:
            running = sorted(running, key=lambda each: (each.priority, each.arrival_time))
        return [(request.request_id, not request.is_prefill_chunk) for request in running]

    def _check_victims(
        self, ranked: list[tuple[str, bool]], running: list[str], decoded: tuple[str, ...]
    ) -> None:
        """Blocks are taken from the last; whoever decodes, the first of them is among those."""
        kept = [name in running for name, _ in ranked]
        assert kept == sorted(kept, reverse=True), "a request was preempted before a later one"
        self.preempted += [name for name, _ in ranked if name not in running]
        if decoded:
            first = next(name for name, decodes in ranked if decodes)
            assert first in decoded, "the first request was passed over"

    def run(self, limit: int = 3000) -> "Simulation":
        """Until nothing is left to do."""
        for _ in range(limit):
            if not self.scheduler.has_unfinished_requests():
                break
            self.step()
        assert not self.scheduler.has_unfinished_requests(), "no progress"
        self.check_nothing_is_held()
        return self

    def check_nothing_is_held(self) -> None:
        scheduler = self.scheduler
        self.ended |= scheduler.schedule().finished_req_ids  # the last ones
        assert self.ended >= self.outputs.keys()
        assert not scheduler.requests
        assert not scheduler.running
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # block 0
        assert not scheduler.encoder_cache_manager.request_cached_ids


def run(scheduler: SpyreScheduler, *requests: Request) -> Simulation:
    for request in requests:
        scheduler.add_request(request)
    return Simulation(scheduler).run()


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


def test_without_the_embedding_a_covered_image_is_not_encoded(scheduler: SpyreScheduler) -> None:
    scheduler.settings = SpyreSettings()
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
    for _ in range(3):
        simulation.step()
    # The first chunk needs the image at 70, so nothing at all is computed.
    assert simulation.kinds == []
    assert not cache.request_cached_ids.get("a")
    cache.free(blocker)
    simulation.run()


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


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """Requests: prompt length, tokens wanted, prompt contents, step at which it arrives."""
    request = st.tuples(
        st.integers(1, 700), st.integers(1, 40), st.integers(1, 2), st.integers(0, 30)
    )
    return draw(st.lists(request, min_size=1, max_size=9))


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
)
def test_any_workload_finishes_within_the_rules(
    make: Callable[..., SpyreScheduler],
    workload: list[tuple[int, int, int, int]],
    num_blocks: int,
    bound: int,
    policy: SchedulerPolicy,
    aborted: int,
) -> None:
    scheduler = make(num_blocks, bound, policy)
    simulation = Simulation(scheduler)
    pending = sorted(enumerate(workload), key=lambda item: item[1][3])
    for step in range(31):
        while pending and pending[0][1][3] <= step:
            number, (length, wanted, contents, _) = pending.pop(0)
            place = (length // 4, length // 2)
            images = {f"i{contents}-{length}": place} if length > 8 else {}
            request = make_request(
                f"r{number}", length, max_tokens=wanted, fill=contents, images=images
            )
            request.priority = length % 3
            scheduler.add_request(request)
        simulation.step()
        if step == 20:
            scheduler.finish_requests(f"r{aborted}", RequestStatus.FINISHED_ABORTED)
    simulation.run()
    for number, (length, wanted, _, _) in enumerate(workload):
        if number != aborted:
            assert simulation.outputs[f"r{number}"] == min(wanted, MAX_MODEL_LEN - length)


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


@pytest.fixture(autouse=True)
def _no_state_between_tests(vllm_config: VllmConfig) -> Iterator[None]:
    yield
    vllm_config.cache_config.num_gpu_blocks = None

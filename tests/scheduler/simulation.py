# SPDX-License-Identifier: Apache-2.0
"""vLLM's real scheduler with a model that is only pretended.

Every scenario is driven to its end by :class:`Simulation`, which checks each step against the
rules that hold for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_spyre_mm.scheduler.outputs import (
    EncodingDone,
    SpyreModelRunnerOutput,
    SpyreSchedulerOutput,
)
from vllm_spyre_mm.scheduler.scheduler import SpyreScheduler

CHUNK = 128
BLOCK = 64
MAX_MODEL_LEN = 1024


def make_config(
    checkpoint: Path, *, encode_ahead: bool = False, settings: Any = None, **arguments: Any
) -> VllmConfig:
    """Of an engine with small chunks and four rows.

    Args:
        checkpoint: of the model.
        encode_ahead: the setting; off, each image is encoded in the step of a chunk.
        settings: more of them.
        arguments: of the engine.
    """
    return EngineArgs(
        additional_config={"encode_ahead": encode_ahead, **(settings or {})},
        model=str(checkpoint),
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=4,
        enforce_eager=True,
        **arguments,
    ).create_engine_config()


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
            ``("decode", names)``; ``("piece",)`` where a part of an image was encoded beside it.
        preempted: names in the order in which they lost their blocks.
        encoded: identifiers in the order in which they were to be encoded.
        cached: identifiers of the images of which the worker has the features.
        pieces: of the encoding of an image, where images are encoded ahead of time.
        asked: images that are being encoded, with the pieces that are left of each.
        cancelled: identifiers of images that were asked for in vain.
        faults: what becomes of images that cannot be encoded.
        outputs: number of tokens that each request got.
        reasons: of requests that ended for a reason.
        stats: of the steps.
        ended: names of finished requests of which the worker was told.
    """

    scheduler: SpyreScheduler
    kinds: list[tuple[Any, ...]] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    encoded: list[str] = field(default_factory=list)
    cached: set[str] = field(default_factory=set)
    pieces: int = 3
    asked: dict[str, int] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    stats: list[Any] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.cached |= self.scheduler.encoder_cache_manager.cached.keys()

    def step(self) -> bool:
        """One step; False if nothing was scheduled."""
        scheduler = self.scheduler
        ranked = self._ranked()
        names = [name for name, _ in ranked]
        output = scheduler.schedule()
        scheduled = output.num_scheduled_tokens
        self.ended |= output.finished_req_ids
        self.cached.difference_update(output.free_encoder_mm_hashes)
        for name, items in output.scheduled_encoder_inputs.items():
            features = scheduler.requests[name].mm_features
            self.encoded += [features[item].identifier for item in items]
            self.cached |= {features[item].identifier for item in items}
        admitted = {data.req_id for data in output.scheduled_new_reqs}
        admitted |= output.scheduled_cached_reqs.resumed_req_ids
        for data in output.scheduled_new_reqs:
            assert data.mm_features == scheduler.requests[data.req_id].mm_features
        order = [request.request_id for request in scheduler.running]
        assert [name for name in order if name in names] == [
            name for name in names if name in order
        ], "the order of running requests changed"
        requests = [scheduler.requests[name] for name in scheduled]
        done = self._encode(output)
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
            SpyreModelRunnerOutput(
                req_ids=list(scheduled),
                req_id_to_index={name: row for row, name in enumerate(scheduled)},
                sampled_token_ids=tokens,
                encodings_done=done,
            ),
        )
        for client in results.values():
            if client.scheduler_stats is not None:
                self.stats.append(client.scheduler_stats)
            for result in client.outputs:
                count = self.outputs.get(result.request_id, 0) + len(result.new_token_ids)
                self.outputs[result.request_id] = count
                if isinstance(result.stop_reason, str):
                    self.reasons[result.request_id] = result.stop_reason
        return bool(scheduled)

    def _encode(self, output: SchedulerOutput) -> list[EncodingDone]:
        """Pretend to encode, in the order asked for, an image in :attr:`pieces` pieces."""
        if not isinstance(output, SpyreSchedulerOutput):
            return []
        for identifier in output.cancelled_images:
            del self.asked[identifier]  # it was asked for, and is not done
            self.cancelled.append(identifier)
        for image in output.images_to_encode:
            assert image.identifier not in self.asked, "an image is under way twice"
            self.asked[image.identifier] = self.pieces
        if not (output.may_encode and self.asked):
            return []
        self.kinds.append(("piece",))
        identifier = next(iter(self.asked))
        self.asked[identifier] -= 1
        if self.asked[identifier]:
            return []
        del self.asked[identifier]
        fault = self.faults.get(identifier)
        if fault is None:
            self.encoded.append(identifier)
            self.cached.add(identifier)
        return [EncodingDone(identifier, fault)]

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
        for feature in request.mm_features:
            place = feature.mm_position
            if place.offset >= end or place.offset + place.length <= start:
                continue
            within = (max(0, start - place.offset), min(place.length, end - place.offset))
            begin, stop = place.get_embeds_indices_in_range(*within)
            if begin < stop:
                assert feature.identifier in self.cached, "a chunk without its image's features"
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
        output = scheduler.schedule()  # the last messages
        self.ended |= output.finished_req_ids
        self.cached.difference_update(output.free_encoder_mm_hashes)
        assert self.ended >= self.outputs.keys()
        assert not scheduler.requests
        assert not scheduler.running
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # block 0
        books = scheduler.encoder_cache_manager
        assert not books.request_cached_ids
        assert not self.asked
        assert books.num_freeable_slots == books.cache_size
        assert books.num_free_slots == books.cache_size - sum(books.freeable.values())
        assert books.cached.keys() == books.freeable.keys() == books.num_embeds_by_hash.keys()
        assert books.cached.keys() == self.cached, "the worker holds other images"


def run(scheduler: SpyreScheduler, *requests: Request) -> Simulation:
    for request in requests:
        scheduler.add_request(request)
    return Simulation(scheduler).run()


def give_pixels(request: Request) -> None:
    """400 bytes of them, for the first image of a request."""
    pixels = MultiModalFieldElem(torch.zeros(100), MultiModalBatchedField())
    request.mm_features[0].data = MultiModalKwargsItem({"pixel_values": pixels})


def picture(name: str, num_tokens: int = 100, size: int = 50, **more: Any) -> Request:
    """A request with an image of its own."""
    images = {f"of {name}": (10, size)}
    return make_request(name, num_tokens, images=images, fill=sum(map(ord, name)), **more)


def add(simulation: Simulation, *requests: Request) -> None:
    for request in requests:
        simulation.scheduler.add_request(request)


def steps(simulation: Simulation, count: int) -> None:
    for _ in range(count):
        simulation.step()


def until(simulation: Simulation, holds: Callable[[], object]) -> None:
    """Step until something holds."""
    for _ in range(500):
        if holds():
            return
        simulation.step()
    raise AssertionError("it never comes")


def admissions(kinds: list[tuple[Any, ...]]) -> list[str]:
    """Names in the order in which their prefills began, of steps as in :class:`Simulation`."""
    return [kind[1] for kind in kinds if kind[0] == "prefill" and kind[2] == 0]


def check_gaps(simulation: Simulation) -> None:
    """Between two tokens of a request lies one chunk or one piece of an image at most."""
    kinds = simulation.kinds
    decodes = [i for i, kind in enumerate(kinds) if kind[0] == "decode"]
    for first, second in pairwise(decodes):
        if set(kinds[first][1]) & set(kinds[second][1]):
            between = [kind[0] for kind in kinds[first + 1 : second]]
            assert between.count("prefill") + between.count("piece") <= 1

# SPDX-License-Identifier: Apache-2.0
"""A plugin of vLLM's that tells what the server's and the engine's process hold.

With this folder on ``PYTHONPATH`` and ``VLLM_SERVER_DEV_MODE=1``, calls of ``soak_counts`` and
``soak_mentions`` at ``/collective_rpc`` return what the front end has, and then each worker.
"""

import asyncio
import concurrent.futures.thread
import functools
import gc
import re
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

REQUEST_ID = re.compile(r"^(?:\d+_)?(?:chatcmpl|cmpl|mmemb)-")
CONTAINERS = (dict, set, list, deque)
QUEUED = ("_waiting", "_alone", "_batch", "_cancelled", "_suspects")
"""What the one or the other queue of images has. (The encoder's process may go on with an image
that nobody wants any more until the next step, so that ``_sent`` may have it.)"""

schedulers: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""The scheduler of the engine that runs in this process."""


@dataclass
class Work:
    """What the engine of this process has done.

    Attributes:
        steps: that computed something.
        encoded: images that were scheduled for the encoder.
        evicted: images that the encoder cache had no more room for.
        late: steps begun between the arrival of a request's abort and the last step that it took
            part in, at most. One is the step under way: its requests may be chosen already.
        arrived: by hash of a request's id, the steps begun when its abort arrived.
    """

    steps: int = 0
    encoded: int = 0
    evicted: int = 0
    late: int = 0
    arrived: dict[int, int] = field(default_factory=dict)


work = Work()


def register() -> None:
    """Extend the classes where they are loaded, or will be."""
    from vllm_spyre_mm.upstream.module_loading import when_loaded

    when_loaded("vllm.v1.engine.async_llm", _extend_front_end)
    when_loaded("vllm_spyre_mm.worker.worker", _extend_worker)
    when_loaded("vllm_spyre_mm.scheduler.scheduler", _watch_scheduler)
    when_loaded("vllm.v1.engine.core", _watch_aborts)


def mentions() -> dict[str, int]:
    """Containers of this process that have a request's id as a key or an element, by description.

    A dict of plain values is not tracked by the collector; it is found in what refers to it.
    """
    gc.collect()
    gc.unfreeze()  # vLLM hides what it made at its start from the collector
    tracked = gc.get_objects()
    found: Counter[str] = Counter()
    seen = {id(tracked)}
    for holder in tracked:
        for each in (holder, *gc.get_referents(holder)):
            if isinstance(each, CONTAINERS) and id(each) not in seen:
                seen.add(id(each))
                _count(each, holder, found)
    del tracked
    gc.freeze()
    return dict(found)


def _count(container: Any, holder: object, found: "Counter[str]") -> None:
    ids = [
        each
        for each in list(container)
        if isinstance(each, str) and len(each) < 100 and REQUEST_ID.match(each)
    ]
    if ids:
        name = f"{type(container).__name__} in {type(holder).__name__} with {ids[0]}"
        found[name] += len(ids)


def _pools() -> dict[str, int]:
    """Threads of executors, which fill up when they are needed, and the executors."""
    workers = dict(concurrent.futures.thread._threads_queues)  # type: ignore[attr-defined]
    return {"pool_threads": len(workers), "pools": len({id(work) for work in workers.values()})}


def _sizes(**containers: Iterable[Any]) -> dict[str, int]:
    return {name: len(list(container)) for name, container in containers.items()}


def _extend_front_end(module: ModuleType) -> None:
    engine = module.AsyncLLM  # type: ignore[attr-defined]
    original = engine.collective_rpc

    async def collective_rpc(self: Any, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        results = await original(self, method, *args, **kwargs)
        if method == "soak_mentions":
            return [mentions(), *results]
        return [_front_end(self), *results] if method == "soak_counts" else results

    engine.collective_rpc = collective_rpc


def _front_end(engine: Any) -> dict[str, Any]:
    processor = engine.output_processor
    counts = _sizes(
        requests=processor.request_states,
        parents=processor.parent_requests,
        external_ids=processor.external_req_ids,
        tasks=asyncio.all_tasks(),
    )
    return {"counts": counts | _pools()}


def _watch_scheduler(module: ModuleType) -> None:
    scheduler = module.SpyreScheduler  # type: ignore[attr-defined]
    original, schedule_originally = scheduler.__init__, scheduler.schedule

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        schedulers.add(self)

    @functools.wraps(schedule_originally)
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = schedule_originally(self, *args, **kwargs)
        work.steps += bool(output.num_scheduled_tokens)
        work.encoded += sum(map(len, output.scheduled_encoder_inputs.values()))
        work.encoded += len(getattr(output, "images_to_encode", ()))
        work.evicted += len(output.free_encoder_mm_hashes)
        for req_id in output.num_scheduled_tokens:
            late = work.steps - work.arrived.get(hash(req_id), work.steps)
            work.late = max(work.late, late)
        return output

    scheduler.__init__, scheduler.schedule = __init__, schedule


def _watch_aborts(module: ModuleType) -> None:
    engine = module.EngineCore  # type: ignore[attr-defined]
    original = engine.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        put = self.aborts_queue.put_nowait

        def put_nowait(req_ids: list[str]) -> None:
            for req_id in req_ids:
                work.arrived.setdefault(hash(req_id), work.steps)
            put(req_ids)

        self.aborts_queue.put_nowait = put_nowait

    engine.__init__ = __init__


def _extend_worker(module: ModuleType) -> None:
    worker = module.SpyreWorker  # type: ignore[attr-defined]
    worker.soak_counts, worker.soak_mentions = _worker, lambda self: mentions()


def _worker(worker: Any) -> dict[str, Any]:
    runner = worker.model_runner
    requests: Mapping[str, Any] = runner.requests._requests
    counts = _sizes(
        worker_requests=requests,
        worker_embeddings=[
            each for each in requests.values() if each.mm_parts or each.mm_embedding is not None
        ],
        decoding=runner.decodes.req_ids,
        prefilled=runner.prefilled.req_ids,
        under_way_asked=worker.ahead._asked,
    )
    queue = worker.ahead._queue
    counts |= {f"under_way_in_queue{name}": len(getattr(queue, name, ())) for name in QUEUED}
    for scheduler in schedulers:
        pool = scheduler.kv_cache_manager.block_pool
        books = scheduler.encoder_cache_manager
        features = runner.encoder_cache.tensors
        counts |= _sizes(
            scheduled=scheduler.requests,
            running=scheduler.running,
            waiting=scheduler.waiting,
            encoder_references=books.request_cached_ids,
            under_way_scheduled=scheduler._ahead._reservations._under_way,
            under_way_reservations=scheduler._ahead._reservations._holders,
            referenced_images=[name for name, users in books.cached.items() if users],
            images_without_features=set(books.cached) - set(features),
            features_without_image=set(features) - set(books.cached) - set(books.freed),
        )
        counts["held_bytes"] = scheduler._embedding_budget.held(scheduler.requests)
        counts["blocks_in_use"] = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        counts["encoder_places_lost"] = books.cache_size - books.num_freeable_slots
    done = {name: getattr(work, name) for name in ("steps", "encoded", "evicted", "late")}
    return {"counts": counts | _pools(), "work": done}

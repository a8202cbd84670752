# SPDX-License-Identifier: Apache-2.0
"""A plugin of vLLM's that tells what the server's and the engine's process hold.

With this folder on ``PYTHONPATH`` and ``VLLM_SERVER_DEV_MODE=1``, a call of ``soak_state`` at
``/collective_rpc`` returns the state of the front end, and after it that of each worker.
"""

import asyncio
import concurrent.futures.thread
import gc
import re
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

METHOD = "soak_state"
REQUEST_ID = re.compile(r"^(?:\d+_)?(?:chatcmpl|cmpl|mmemb)-")
CONTAINERS = (dict, set, list, deque)

schedulers: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""The scheduler of the engine that runs in this process."""


def register() -> None:
    """Extend the classes where they are loaded, or will be."""
    from vllm_spyre_mm.vllm_hooks.module_loading import when_loaded

    when_loaded("vllm.v1.engine.async_llm", _extend_front_end)
    when_loaded("vllm_spyre_mm.worker.worker", _extend_worker)
    when_loaded("vllm_spyre_mm.scheduler", _note_scheduler)


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
        return [_front_end(self), *results] if method == METHOD else results

    engine.collective_rpc = collective_rpc


def _front_end(engine: Any) -> dict[str, Any]:
    processor = engine.output_processor
    return {
        "counts": _sizes(
            requests=processor.request_states,
            parents=processor.parent_requests,
            external_ids=processor.external_req_ids,
            tasks=asyncio.all_tasks(),
        )
        | _pools(),
        "mentions": mentions(),
    }


def _note_scheduler(module: ModuleType) -> None:
    scheduler = module.SpyreScheduler  # type: ignore[attr-defined]
    original = scheduler.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        schedulers.add(self)

    scheduler.__init__ = __init__


def _extend_worker(module: ModuleType) -> None:
    module.SpyreWorker.soak_state = _worker  # type: ignore[attr-defined]


def _worker(worker: Any) -> dict[str, Any]:
    runner = worker.model_runner
    states: Mapping[str, Any] = runner.requests._states
    counts = _sizes(
        worker_requests=states,
        worker_embeddings=[
            state for state in states.values() if state.mm_parts or state.mm_embedding is not None
        ],
        decoding=runner.decodes.req_ids,
        prefilled=runner.prefilled.req_ids,
    )
    for scheduler in schedulers:
        pool = scheduler.kv_cache_manager.block_pool
        books = scheduler.encoder_cache_manager
        features = runner.encoder_cache._features
        counts |= _sizes(
            scheduled=scheduler.requests,
            running=scheduler.running,
            waiting=scheduler.waiting,
            encoder_references=books.request_cached_ids,
            referenced_images=[name for name, users in books.cached.items() if users],
            images_without_features=set(books.cached) - set(features),
            features_without_image=set(features) - set(books.cached) - set(books.freed),
        )
        counts["held_bytes"] = scheduler._accounts.held(scheduler.requests)
        counts["blocks_in_use"] = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        counts["encoder_places_lost"] = books.cache_size - books.num_freeable_slots
    return {"counts": counts | _pools(), "mentions": mentions()}

# SPDX-License-Identifier: Apache-2.0
"""Refuses what the worker has no part in, before vLLM has changed the state of the engine for it.

The worker refuses each of these operations by itself (``worker.unsupported_operations``); this is
about two that are too late there, and about the answer.

Leans on: ``EngineCore.sleep`` and ``EngineCore.release_kv_cache_memory`` are what a server and
``LLM`` come to; the client of an engine in another process hands every answer to
``_process_utility_output`` of its module, which makes an ``Exception`` of the message; the server
answers a ``NotImplementedError`` with its text (HTTP 501).
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded
from vllm_spyre_mm.vllm_fixes.fault import Fault

FAULT = Fault(
    "vLLM pauses the engine, or notes that the memory of its KV cache is gone, before it finds "
    "that the worker cannot do it: the engine stays like that. What a worker in another process "
    "raises is an Exception in the front end, answered with HTTP 500.",
    seen_in="0.32.0",
)
REPLACED = (
    "vllm.v1.engine.core.EngineCore.sleep",
    "vllm.v1.engine.core.EngineCore.release_kv_cache_memory",
    "vllm.v1.engine.core_client._process_utility_output",
)


def install() -> None:
    """Extend vLLM's engine and its client as soon as they exist."""
    when_loaded("vllm.v1.engine.core", _extend_engine)
    when_loaded("vllm.v1.engine.core_client", _extend_client)


def _extend_engine(module: ModuleType) -> None:
    require_attributes(module, ("EngineCore",))
    engine = module.EngineCore
    require_attributes(engine, ("sleep", "release_kv_cache_memory"))
    if is_extended(engine.sleep, __name__):
        return
    require_parameters(engine.sleep, ("level", "mode"))
    engine.sleep = _pausing_alone(engine.sleep)
    engine.release_kv_cache_memory = _keeping_kv_cache(engine.release_kv_cache_memory)


def _pausing_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_spyre_mm.worker.unsupported_operations import SLEEP, refuse

    @extending(original, __name__)
    def sleep(self: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        if level >= 1:
            refuse(SLEEP)
        return original(self, level, *args, **kwargs)

    return sleep


def _keeping_kv_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_spyre_mm.worker.unsupported_operations import KV_CACHE_RELEASE, refuse

    @extending(original, __name__)
    def release_kv_cache_memory(self: Any) -> None:
        refuse(KV_CACHE_RELEASE)

    return release_kv_cache_memory


def _extend_client(module: ModuleType) -> None:
    require_attributes(module, ("_process_utility_output",))
    original = module._process_utility_output
    if is_extended(original, __name__):
        return
    require_parameters(original, ("output", "utility_results"))

    @extending(original, __name__)
    def _process_utility_output(output: Any, utility_results: dict[int, Any]) -> None:
        refused = refused_in(output.failure_message)
        if refused is None:
            original(output, utility_results)
            return
        future = utility_results.pop(output.call_id)
        if not future.done():  # nobody waits any more
            future.set_exception(NotImplementedError(f"not supported on Spyre: {refused}"))

    module._process_utility_output = _process_utility_output  # type: ignore[attr-defined]


def refused_in(message: str | None) -> str | None:
    """What a worker or the engine refused, by the message that vLLM made of its sentence."""
    from vllm_spyre_mm.worker.unsupported_operations import UNSUPPORTED

    for what in UNSUPPORTED.values():
        if f"not supported on Spyre: {what}" in (message or ""):
            return what
    return None

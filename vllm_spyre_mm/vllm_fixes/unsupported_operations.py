# SPDX-License-Identifier: Apache-2.0
"""Refuses what operators may ask of a running engine and the platform's worker has no part in.

By itself vLLM pauses the engine, or notes that its memory is gone, before it finds that the worker
has no such method: the engine would stay like that.

Leans on: an operation reaches the engine by a method of ``AsyncLLM`` (a server's endpoints) or
``LLMEngine`` (``LLM``), and one that is the worker's alone by their ``collective_rpc``; the server
answers a ``NotImplementedError`` with its text (HTTP 501). An operation that this release of vLLM
has in one of the two classes alone is refused there.
"""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded

WEIGHTS = "other weights in a running engine: start one with them"
LORA = "LoRA"
PROFILER = "vLLM's profiler"

OPERATIONS = {
    "sleep": "sleep beyond level 0, which pauses the engine",
    "release_kv_cache_memory": "an engine that gives the memory of its KV cache back",
    "compute_weight_checksums": "checksums of the weights",
    "start_profile": PROFILER,
    "stop_profile": PROFILER,
    "add_lora": LORA,
    "remove_lora": LORA,
    "list_loras": LORA,
    "pin_lora": LORA,
}
"""Methods of an engine, and what they are refused as."""

WORKER_METHODS = {
    "init_weight_transfer_engine": WEIGHTS,
    "shutdown_weight_transfer_engine": WEIGHTS,
    "start_weight_update": WEIGHTS,
    "start_draft_weight_update": WEIGHTS,
    "update_weights": WEIGHTS,
    "finish_weight_update": WEIGHTS,
    "reset_weights": WEIGHTS,
    "reload_weights": WEIGHTS,
    "checkpoint_prepare": "snapshots of a running engine",
    "checkpoint_restore": "snapshots of a running engine",
}
"""Methods of vLLM's own workers, and what they are refused as."""


def install() -> None:
    """Extend vLLM's engines as soon as they exist."""
    when_loaded("vllm.v1.engine.async_llm", functools.partial(_extend, name="AsyncLLM"))
    when_loaded("vllm.v1.engine.llm_engine", functools.partial(_extend, name="LLMEngine"))


def _extend(module: ModuleType, name: str) -> None:
    require_attributes(module, (name,))
    engine = getattr(module, name)
    require_attributes(engine, ("sleep", "release_kv_cache_memory", "collective_rpc"))
    if is_extended(engine.collective_rpc, __name__):
        return
    require_parameters(engine.sleep, ("level",))
    require_parameters(engine.collective_rpc, ("method",))
    for operation in (*OPERATIONS, "collective_rpc"):
        original = vars(engine).get(operation)
        if original is not None:
            setattr(engine, operation, _refusing(original))


def refused(operation: str, arguments: dict[str, Any]) -> str | None:
    """What an operation is refused as; None for one that may go on.

    Args:
        operation: the name of a method of an engine.
        arguments: its arguments, defaults among them.
    """
    if operation == "collective_rpc":
        method = arguments["method"]
        return WORKER_METHODS.get(method) if isinstance(method, str) else None
    if operation == "sleep" and arguments["level"] < 1:
        return None
    return OPERATIONS[operation]


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def check(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        what = refused(original.__name__, given.arguments)
        if what is not None:
            raise NotImplementedError(f"not supported on Spyre: {what}")

    @extending(original, __name__)
    async def operate_later(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return await original(*args, **kwargs)

    @extending(original, __name__)
    def operate(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return original(*args, **kwargs)

    return operate_later if inspect.iscoroutinefunction(original) else operate

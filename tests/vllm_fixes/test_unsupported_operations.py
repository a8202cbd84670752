# SPDX-License-Identifier: Apache-2.0
"""What the worker has no part in is refused before the engine hears of it."""

import asyncio
import inspect
import re
from types import ModuleType
from typing import Any

import pytest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker.worker_base import WorkerBase

from vllm_spyre_mm.frontend.hooks import install
from vllm_spyre_mm.upstream.contract import UnsupportedVllmError
from vllm_spyre_mm.vllm_fixes import unsupported_operations as worker_operations
from vllm_spyre_mm.vllm_fixes.unsupported_operations import OPERATIONS, WORKER_METHODS
from vllm_spyre_mm.worker.worker import SpyreWorker


class Unreachable:
    """Stands for an engine of which nothing may be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was looked at")


def run(outcome: Any) -> None:
    if inspect.iscoroutine(outcome):
        asyncio.run(outcome)


@pytest.mark.parametrize("engine", [AsyncLLM, LLMEngine])
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "sleep"])
def test_refused_and_the_engine_untouched(engine: Any, operation: str) -> None:
    install()
    method = vars(engine).get(operation)
    if method is None:
        return  # this engine never had it
    parameters = list(inspect.signature(method).parameters.values())[1:]
    needed = [each for each in parameters if each.default is inspect.Parameter.empty]
    with pytest.raises(NotImplementedError, match="not supported on Spyre: "):
        run(method(Unreachable(), *["argument"] * len(needed)))


@pytest.mark.parametrize("engine", [AsyncLLM, LLMEngine])
def test_sleep_is_a_pause_at_level_0_and_refused_beyond(engine: Any) -> None:
    for arguments in ((), (1,), (2, "keep")):
        with pytest.raises(NotImplementedError, match="sleep beyond level 0"):
            run(engine.sleep(Unreachable(), *arguments))
    with pytest.raises(AssertionError, match="engine_core was looked at"):
        run(engine.sleep(Unreachable(), 0))


@pytest.mark.parametrize("engine", [AsyncLLM, LLMEngine])
def test_calls_of_the_workers(engine: Any) -> None:
    for method in WORKER_METHODS:
        with pytest.raises(NotImplementedError, match="not supported on Spyre: "):
            run(engine.collective_rpc(Unreachable(), method))
    for method in ("of_an_extension", len):
        with pytest.raises(AssertionError, match="engine_core was looked at"):
            run(engine.collective_rpc(Unreachable(), method))


def test_only_what_the_worker_lacks_is_refused() -> None:
    for method in WORKER_METHODS:
        assert not hasattr(SpyreWorker, method)
    for method in ("sleep", "wake_up", "discard", "profile"):
        assert not hasattr(SpyreWorker, method)
    for method in ("add_lora", "remove_lora", "list_loras", "pin_lora"):
        assert getattr(SpyreWorker, method) is getattr(WorkerBase, method)


def test_every_method_of_the_workers_that_the_front_end_calls_is_there_or_refused() -> None:
    source = inspect.getsource(inspect.getmodule(AsyncLLM.pause_generation))  # type: ignore[arg-type]
    called = set(re.findall(r'collective_rpc\(\s*"(\w+)"', source))
    assert len(called) > 5
    assert {name for name in called if not hasattr(SpyreWorker, name)} <= set(WORKER_METHODS)


def test_installing_again_wraps_nothing_twice() -> None:
    install()
    before = {engine: dict(vars(engine)) for engine in (AsyncLLM, LLMEngine)}
    install()
    assert {engine: dict(vars(engine)) for engine in (AsyncLLM, LLMEngine)} == before


def test_a_vllm_without_what_is_extended_is_refused() -> None:
    module = ModuleType("vllm.v1.engine.async_llm")
    with pytest.raises(UnsupportedVllmError, match="AsyncLLM"):
        worker_operations._extend(module, "AsyncLLM")
    module.AsyncLLM = type("AsyncLLM", (), {})
    with pytest.raises(UnsupportedVllmError, match="sleep"):
        worker_operations._extend(module, "AsyncLLM")

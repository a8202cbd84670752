# SPDX-License-Identifier: Apache-2.0
"""What the worker has no part in is refused before the engine hears of it."""

import asyncio
import inspect
import re
from concurrent.futures import Future
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine import core, core_client
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker.worker_base import WorkerBase

from vllm_spyre_mm.frontend.hooks import install
from vllm_spyre_mm.upstream.contract import UnsupportedVllmError
from vllm_spyre_mm.vllm_fixes import unsupported_operations
from vllm_spyre_mm.worker.unsupported_operations import UNSUPPORTED
from vllm_spyre_mm.worker.worker import SpyreWorker


@pytest.fixture(autouse=True)
def installed() -> None:
    """As the platform's entry point does it; more than once is harmless."""
    install()


class Unreachable:
    """Stands for an engine of which nothing may be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was looked at")


class Executor(UniProcExecutor):
    """vLLM's, over a worker that has only methods."""

    def __init__(self) -> None:
        self.driver_worker: Any = SpyreWorker.__new__(SpyreWorker)
        self.sleeping_tags: set[str] = set()
        self.world_size = 1


@pytest.mark.parametrize("operation", UNSUPPORTED)
def test_refused_by_the_worker(operation: str) -> None:
    """However it comes there: vLLM's engine has it asked by its name."""
    for arguments in ((), ("argument",)):
        with pytest.raises(NotImplementedError, match="not supported on Spyre: "):
            Executor().collective_rpc(operation, args=arguments)


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("add_lora", (SimpleNamespace(lora_int_id=1),)),
        ("remove_lora", (1,)),
        ("list_loras", ()),
        ("pin_lora", (1,)),
        ("compute_weight_checksums", ()),
        ("profile", (True,)),
    ],
)
def test_refused_and_the_engine_untouched(operation: str, arguments: tuple[Any, ...]) -> None:
    engine: Any = EngineCore.__new__(EngineCore)
    engine.model_executor = Executor()
    before = dict(vars(engine))
    with pytest.raises(NotImplementedError, match="not supported on Spyre: "):
        getattr(EngineCore, operation)(engine, *arguments)
    assert vars(engine) == before
    assert engine.model_executor.sleeping_tags == set()


def test_sleep_is_a_pause_at_level_0_and_refused_beyond() -> None:
    for arguments in ((), (1,), (2, "keep")):
        with pytest.raises(NotImplementedError, match="sleep beyond level 0"):
            EngineCore.sleep(Unreachable(), *arguments)
    with pytest.raises(AssertionError, match="pause_scheduler was looked at"):
        EngineCore.sleep(Unreachable(), 0)


def test_the_memory_of_the_kv_cache_stays() -> None:
    with pytest.raises(NotImplementedError, match="gives the memory of its KV cache back"):
        EngineCore.release_kv_cache_memory(Unreachable())


def test_vllm_alone_pauses_before_it_asks_the_worker() -> None:
    """The fault that is mended; if this fails, vLLM has mended it and the hook can go."""
    paused: list[bool] = []

    class Engine:
        model_executor = Executor()

        def pause_scheduler(self, **_: Any) -> None:
            paused.append(True)

    with pytest.raises(NotImplementedError):
        EngineCore.sleep.__wrapped__(Engine(), 1)
    assert paused
    with pytest.raises(NotImplementedError):
        Engine.model_executor.discard(("kv_cache",))
    assert Engine.model_executor.sleeping_tags == {"kv_cache"}


@pytest.mark.parametrize(
    "message",
    [
        "Call to sleep method failed: not supported on Spyre: LoRA",
        "Call to x method failed: Worker failed with error 'not supported on Spyre: LoRA', please "
        "check the stack trace above for the root cause",
    ],
    ids=["in the engine", "a rank in a process of its own"],
)
def test_a_refusal_is_one_in_the_front_end(message: str) -> None:
    future: Future[Any] = Future()
    output = SimpleNamespace(call_id=1, failure_message=message)
    core_client._process_utility_output(output, {1: future})
    error = future.exception()
    assert isinstance(error, NotImplementedError)
    assert str(error) == "not supported on Spyre: LoRA"


def test_a_refusal_that_nobody_waits_for_is_dropped() -> None:
    async def answer() -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        output = SimpleNamespace(call_id=1, failure_message="not supported on Spyre: LoRA")
        core_client._process_utility_output(output, {1: future})

    asyncio.run(answer())


@pytest.mark.parametrize("failure", [None, "Call to x method failed: another reason"])
def test_other_answers_are_vllms(failure: str | None) -> None:
    future: Future[Any] = Future()
    result = SimpleNamespace(result=5)
    output = SimpleNamespace(call_id=1, failure_message=failure, result=result)
    core_client._process_utility_output(output, {1: future})
    if failure is None:
        assert future.result() == 5
    else:
        assert type(future.exception()) is Exception


def test_calls_of_the_workers() -> None:
    """What is not refused by its name is the worker's, or a plugin's extension of it."""
    executor = Executor()
    executor.driver_worker.of_an_extension = lambda: 5
    assert executor.collective_rpc("of_an_extension") == [5]
    assert executor.collective_rpc(lambda worker: worker.of_an_extension()) == [5]


def test_only_what_the_worker_lacks_is_refused() -> None:
    for method in UNSUPPORTED:
        assert method not in vars(SpyreWorker)
        base = getattr(WorkerBase, method, None)
        assert base is None or method.endswith(("lora", "loras")), method


def test_every_method_of_the_workers_that_the_front_end_calls_is_there_or_refused() -> None:
    source = inspect.getsource(inspect.getmodule(AsyncLLM.pause_generation))  # type: ignore[arg-type]
    called = set(re.findall(r'collective_rpc\(\s*"(\w+)"', source))
    assert len(called) > 5
    assert {name for name in called if not hasattr(SpyreWorker, name)} == set()


def test_installing_again_wraps_nothing_twice() -> None:
    def found() -> tuple[Any, ...]:
        engine = core.EngineCore
        return engine.sleep, engine.release_kv_cache_memory, core_client._process_utility_output

    before = found()
    unsupported_operations.install()
    assert found() == before


def test_a_vllm_without_what_is_extended_is_refused() -> None:
    module = ModuleType("vllm.v1.engine.core")
    with pytest.raises(UnsupportedVllmError, match="EngineCore"):
        unsupported_operations._extend_engine(module)
    module.EngineCore = type("EngineCore", (), {})  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedVllmError, match="sleep"):
        unsupported_operations._extend_engine(module)

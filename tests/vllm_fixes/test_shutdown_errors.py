# SPDX-License-Identifier: Apache-2.0
"""A server that is told to end answers everybody, and one whose engine died says so."""

import asyncio
import contextlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.launchers.api_server import entry
from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import async_llm, utils
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from vllm_spyre_mm.upstream.contract import UnsupportedVllmError
from vllm_spyre_mm.vllm_fixes import shutdown_errors as server_end


class Engine:
    """As much of ``AsyncLLM`` as its end needs, with one request that waits."""

    def __init__(self) -> None:
        self.queue = RequestOutputCollector(RequestOutputKind.DELTA, "a")
        self.output_processor = OutputProcessor.__new__(OutputProcessor)
        waiting: Any = SimpleNamespace(queue=self.queue)
        self.output_processor.request_states = {"a": waiting}
        self.output_handler: asyncio.Task[None] | None = None
        self.shut_down = False
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=object()))

    def get_num_unfinished_requests(self) -> int:
        return self.output_processor.get_num_unfinished_requests()

    def check_admission(self) -> None:
        """There is room."""

    def shutdown(self, timeout: float | None = None) -> None:
        self.timeout = timeout
        if self.output_handler is not None:
            self.output_handler.get_loop().call_soon_threadsafe(self.output_handler.cancel)


async def wait_while_shut_down(engine: Engine) -> Any:
    """Shut down as the server does, in another thread, while a request waits."""
    engine.output_handler = asyncio.create_task(asyncio.sleep(60))
    shutdown: Any = server_end._ending_requests(Engine.shutdown)
    waiting = asyncio.create_task(engine.queue.get())
    await asyncio.to_thread(shutdown, engine, 3.0)
    return await waiting


def test_requests_that_wait_get_an_error() -> None:
    engine = Engine()
    with pytest.raises(GracefulHTTPError, match=r"^the server was shut down before") as raised:
        asyncio.run(wait_while_shut_down(engine))
    assert raised.value.http_status == 503
    assert engine.timeout == 3.0


def test_no_request_is_admitted_any_more() -> None:
    engine: Any = Engine()
    engine.check_admission()
    server_end._ending_requests(Engine.shutdown)(engine, timeout=3.0)
    with pytest.raises(GracefulHTTPError, match=r"^the server was shut down") as raised:
        engine.check_admission(2, request_id="b")
    assert raised.value.http_status == 503


class Clock:
    """Of a test: a second passes with each look, and a request is finished at the tenth."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, _: float) -> None:
        self.seconds += 1
        if self.seconds == 10:
            self.engine.output_processor.request_states.clear()


@pytest.mark.parametrize(
    ("timeout", "waits"), [(0, 0), (1, 1), (5, 4), (60, 10)], ids="timeout={}".format
)
def test_an_engine_of_another_process_is_given_time(
    monkeypatch: pytest.MonkeyPatch, timeout: int, waits: int
) -> None:
    """To finish requests, but for the last second, or half of the time if that is less."""
    engine: Any = Engine()
    engine.engine_core.resources.engine_manager = None
    clock = Clock(engine)
    monkeypatch.setattr(server_end, "time", clock)
    shutdown = server_end._ending_requests(Engine.shutdown)
    shutdown(engine, timeout=timeout)
    assert clock.seconds == waits
    shutdown(engine, timeout=timeout)
    assert clock.seconds == waits


def test_an_engine_of_this_process_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits itself."""
    engine: Any = Engine()
    clock = Clock(engine)
    monkeypatch.setattr(server_end, "time", clock)
    server_end._ending_requests(Engine.shutdown)(engine, timeout=60)
    assert clock.seconds == 0


def test_an_engine_that_nobody_asked_ends() -> None:
    engine: Any = Engine()
    server_end._ending_requests(Engine.shutdown)(engine, timeout=None)
    assert engine.shut_down


def test_an_engine_whose_loop_is_gone_ends() -> None:
    engine: Any = Engine()

    async def ask() -> None:
        engine.output_handler = asyncio.create_task(asyncio.sleep(0))

    asyncio.run(ask())
    server_end._ending_requests(lambda self, timeout: None)(engine, timeout=None)
    assert engine.shut_down


async def nothing(*_: Any) -> None:
    """A server that ends in order."""


def extended(serve: Any = nothing) -> Any:
    """The server's module, with a server of the test's."""

    async def build_and_serve(engine_client: Any) -> Any:
        return serve()

    async def run_server_worker(engine_client: Any) -> None:
        await (await module.build_and_serve(engine_client))

    module: Any = SimpleNamespace(
        __name__="entry",
        build_and_serve=build_and_serve,
        run_server=None,
        run_server_worker=run_server_worker,
    )
    server_end._extend_entry(module)
    return module


@pytest.mark.parametrize(
    ("errored", "shut_down"), [(False, False), (True, True)], ids=["running", "told to end"]
)
def test_a_server_that_ends_in_order_ends_with_status_0(errored: bool, shut_down: bool) -> None:
    client = SimpleNamespace(errored=errored, shut_down=shut_down)
    asyncio.run(extended().run_server_worker(client))


def test_a_server_whose_engine_died_ends_with_a_sentence() -> None:
    client = SimpleNamespace(errored=True, shut_down=False)
    with pytest.raises(SystemExit, match=r"^the engine's process ended unexpectedly"):
        asyncio.run(extended().run_server_worker(client))


def test_a_server_that_is_interrupted_at_its_start_ends_with_a_sentence() -> None:
    async def serve() -> None:
        raise KeyboardInterrupt("terminated")

    client = SimpleNamespace(errored=False, shut_down=False)
    with pytest.raises(SystemExit, match=r"^the server was told to end before it was ready"):
        asyncio.run(extended(serve).run_server_worker(client))


def test_an_interrupt_while_the_engine_starts_is_not_swallowed() -> None:
    """vLLM's own context swallows it; it is closed nevertheless."""
    closed: list[bool] = []

    @contextlib.contextmanager
    def swallowing(name: str) -> Iterator[str]:
        with contextlib.suppress(KeyboardInterrupt):
            yield name
        closed.append(True)

    module: Any = SimpleNamespace(
        __name__="utils", zmq_socket_ctx=swallowing, launch_core_engines=None
    )
    server_end._let_interrupts_through(module)
    with pytest.raises(KeyboardInterrupt, match="now"), module.zmq_socket_ctx("a"):
        raise KeyboardInterrupt("now")
    with module.zmq_socket_ctx("b") as socket:
        assert socket == "b"
    assert closed == [True, True]


@pytest.mark.parametrize(
    ("extend", "module"),
    [
        (server_end._extend_async_llm, async_llm),
        (server_end._extend_entry, entry),
        (server_end._let_interrupts_through, utils),
    ],
)
def test_extended_once(extend: Any, module: ModuleType) -> None:
    server_end.install()
    names = ("AsyncLLM", "build_and_serve", "run_server_worker", "zmq_socket_ctx")
    before = [getattr(module, name, None) for name in names]
    shutdown = async_llm.AsyncLLM.shutdown
    extend(module)
    assert [getattr(module, name, None) for name in names] == before
    assert async_llm.AsyncLLM.shutdown is shutdown


def test_an_engine_without_what_waits_is_refused() -> None:
    """It is looked for with a default: without it nobody would be told, and no error said so."""

    class AsyncLLM:
        def __init__(self) -> None:
            self.engine_core = self.output_processor = None

        def shutdown(self, timeout: float | None = None) -> None: ...

        check_admission = get_num_unfinished_requests = shutdown

    module = ModuleType("vllm.v1.engine.async_llm")
    module.AsyncLLM = AsyncLLM  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedVllmError, match="sets no attribute 'output_handler'"):
        server_end._extend_async_llm(module)

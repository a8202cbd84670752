# SPDX-License-Identifier: Apache-2.0
"""A server that is told to end answers everybody, and one whose engine died says so."""

import asyncio
import contextlib
import inspect
import queue
import signal
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import zmq
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.launchers.api_server import entry
from vllm.exceptions import GracefulHTTPError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.utils.network_utils import zmq_socket_ctx
from vllm.v1.engine import FinishReason, async_llm, core
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from vllm_spyre_mm.upstream.contract import UnsupportedVllmError
from vllm_spyre_mm.vllm_fixes import shutdown_errors
from vllm_spyre_mm.vllm_fixes.shutdown_errors import SHUT_DOWN


class Engine:
    """As much of ``AsyncLLM`` as its end needs, with one request that waits."""

    def __init__(self) -> None:
        self.queue = RequestOutputCollector(RequestOutputKind.DELTA, "a")
        self.output_processor = OutputProcessor.__new__(OutputProcessor)
        waiting: Any = SimpleNamespace(queue=self.queue)
        self.output_processor.request_states = {"a": waiting}
        self.output_handler: asyncio.Task[None] | None = None
        self.shut_down = self.errored = False
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
    shutdown: Any = shutdown_errors._ending_requests(Engine.shutdown)
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
    shutdown_errors._ending_requests(Engine.shutdown)(engine, timeout=3.0)
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
    monkeypatch.setattr(shutdown_errors, "time", clock)
    shutdown = shutdown_errors._ending_requests(Engine.shutdown)
    shutdown(engine, timeout=timeout)
    assert clock.seconds == waits
    shutdown(engine, timeout=timeout)
    assert clock.seconds == waits


def test_an_engine_of_this_process_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits itself."""
    engine: Any = Engine()
    clock = Clock(engine)
    monkeypatch.setattr(shutdown_errors, "time", clock)
    shutdown_errors._ending_requests(Engine.shutdown)(engine, timeout=60)
    assert clock.seconds == 0


@pytest.mark.parametrize(
    ("state", "reason"),
    [("RUNNING", None), ("REQUESTED", SHUT_DOWN), ("SHUTTING_DOWN", SHUT_DOWN)],
)
def test_an_engine_says_why_it_ends_its_requests(state: str, reason: str | None) -> None:
    """Unless they end for another reason, such as a pause that somebody asked for."""
    engine: Any = core.EngineCoreProc.__new__(core.EngineCoreProc)
    engine.shutdown_state = core.EngineShutdownState[state]
    engine.output_queue = queue.Queue()
    original = inspect.unwrap(core.EngineCoreProc._send_abort_outputs_to_client)
    shutdown_errors._giving_the_reason(original, core)(engine, ["a", "b"], 3)
    client, ended = engine.output_queue.get_nowait()
    assert client == 3
    assert set(ended.finished_requests) == {"a", "b"}
    assert [each.request_id for each in ended.outputs] == ["a", "b"]
    assert {each.finish_reason for each in ended.outputs} == {FinishReason.ABORT}
    assert {each.stop_reason for each in ended.outputs} == {reason}


def completion(finish_reason: str | None, stop_reason: str | None) -> CompletionOutput:
    return CompletionOutput(
        0, "so far", [], None, None, finish_reason=finish_reason, stop_reason=stop_reason
    )


def test_half_an_answer_is_an_error() -> None:
    """Also where another answer to the same prompt is whole."""
    finished, cut = completion("stop", None), completion("abort", SHUT_DOWN)
    output = RequestOutput("a", "prompt", [1], None, [finished, cut], True)
    with pytest.raises(GracefulHTTPError, match=r"^the server was shut down before") as raised:
        shutdown_errors.raise_if_shut_down(output)
    assert raised.value.http_status == 503


@pytest.mark.parametrize(
    ("finish_reason", "stop_reason"), [(None, None), ("abort", None), ("stop", SHUT_DOWN)]
)
def test_other_answers_are_none(finish_reason: str | None, stop_reason: str | None) -> None:
    """Nor is one whose client ended it, or where a stop string reads like the sentence."""
    whole = completion(finish_reason, stop_reason)
    shutdown_errors.raise_if_shut_down(RequestOutput("a", "prompt", [1], None, [whole], False))


@pytest.mark.parametrize(
    ("died", "error", "expected"),
    [
        (False, EngineDeadError(), GracefulHTTPError),
        (True, EngineDeadError(), EngineDeadError),  # it was not the server's end
        (False, KeyError(), KeyError),
        (None, EngineDeadError(), EngineDeadError),  # nobody told it anything
    ],
)
def test_an_engine_that_is_gone_was_told_to_go_or_died(
    died: bool | None, error: Exception, expected: type[Exception]
) -> None:
    engine: Any = Engine()
    if died is not None:
        engine.errored = died
        shutdown_errors._ending_requests(Engine.shutdown)(engine, timeout=0)
    with (
        pytest.raises(expected),
        shutdown_errors.shutdown_answered(engine, EngineDeadError),
    ):
        raise error
    dead_error = shutdown_errors._saying_why_it_is_dead(lambda _: EngineDeadError())
    ended_in_order = died is False
    assert isinstance(dead_error(engine), GracefulHTTPError) == ended_in_order


def test_a_request_that_finds_the_engine_gone_is_told_why() -> None:
    """Before it is admitted: a server asks whether its engine is there."""
    shutdown_errors.install()
    engine = async_llm.AsyncLLM.__new__(async_llm.AsyncLLM)
    engine.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_dead=True))  # type: ignore[assignment]
    engine.shutdown = lambda *_: None  # type: ignore[method-assign]
    for told, expected in ((False, EngineDeadError), (True, GracefulHTTPError)):
        engine.told_to_end = told  # type: ignore[attr-defined]
        serving = GenerateBaseServing.__new__(GenerateBaseServing)
        serving.engine_client = engine
        with pytest.raises(expected):
            serving._preflight()


def test_an_engine_that_nobody_asked_ends() -> None:
    engine: Any = Engine()
    shutdown_errors._ending_requests(Engine.shutdown)(engine, timeout=None)
    assert engine.shut_down


def test_an_engine_whose_loop_is_gone_ends() -> None:
    engine: Any = Engine()

    async def ask() -> None:
        engine.output_handler = asyncio.create_task(asyncio.sleep(0))

    asyncio.run(ask())
    shutdown_errors._ending_requests(lambda self, timeout: None)(engine, timeout=None)
    assert engine.shut_down


class Client:
    """An engine as its server leaves it."""

    def __init__(self, errored: bool = False) -> None:
        self.engine_core, self.errored = None, errored

    shutdown: Any = shutdown_errors._ending_requests(lambda self, timeout: None)


def extended(serve: Any) -> Any:
    """The server's module, with a server of the test's."""

    async def run_server_worker(client: Client) -> None:
        try:
            await serve(client)
        finally:
            client.shutdown(timeout=0)  # as vLLM leaves the context of its engine

    module: Any = SimpleNamespace(
        __name__="entry", run_server=None, run_server_worker=run_server_worker
    )
    shutdown_errors._extend_entry(module)
    return module


def ended(serve: Any, client: Client) -> None:
    asyncio.run(extended(serve).run_server_worker(client))


async def serve_until_told_to_end(client: Client) -> None:
    """Ends the engine in a thread, as vLLM's handler of SIGTERM does."""
    await asyncio.to_thread(client.shutdown, timeout=0)
    client.errored = True


async def serve_until_stopped(client: Client) -> None:
    """Ends before anybody looks at the engine."""


@pytest.mark.parametrize("serve", [serve_until_stopped, serve_until_told_to_end])
def test_a_server_that_ends_in_order_ends_with_status_0(serve: Any) -> None:
    ended(serve, Client())


def test_a_server_whose_engine_died_ends_with_a_sentence() -> None:
    with pytest.raises(SystemExit, match=r"^the engine's process ended unexpectedly"):
        ended(serve_until_stopped, Client(errored=True))
    ended(serve_until_stopped, Client())  # and says nothing of the next one


def test_an_engine_that_did_not_start_did_not_die() -> None:
    client = Client(errored=True)
    del client.engine_core
    ended(serve_until_stopped, client)


def test_a_server_that_is_interrupted_at_its_start_ends_with_a_sentence() -> None:
    async def serve(client: Client) -> None:
        raise KeyboardInterrupt("terminated")

    with pytest.raises(SystemExit, match=r"^the server was told to end before it was ready"):
        ended(serve, Client())


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Puts the handlers of the signals back."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def interrupt(*_: Any) -> None:
    """What vLLM installs for SIGTERM before its server listens."""
    raise KeyboardInterrupt("terminated")


interrupt.__module__ = "entry"


async def start(client: Client) -> None:
    """vLLM's wait for the engine, in which SIGTERM comes; it swallows an interrupt."""
    with zmq_socket_ctx("inproc://start", zmq.PAIR, bind=True):
        signal.raise_signal(signal.SIGTERM)
    raise AssertionError("the start went on")


def test_an_interrupt_while_the_engine_starts_is_not_swallowed() -> None:
    with handlers_kept():
        signal.signal(signal.SIGTERM, interrupt)
        with pytest.raises(SystemExit, match=r"^the server was told to end before it was ready"):
            ended(start, Client())


def test_vllm_alone_swallows_it() -> None:
    """The fault that is mended; if this fails, vLLM has mended it and the handler can go."""
    with handlers_kept():
        signal.signal(signal.SIGTERM, interrupt)
        with pytest.raises(AssertionError, match="the start went on"):
            asyncio.run(start(Client()))


def test_handlers_of_others_stay() -> None:
    """An API server beside others has one that ends it, and so may a program of its own."""
    with handlers_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        before = signal.getsignal(signal.SIGINT)
        shutdown_errors._end_at_signals("entry")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is before


def test_vllms_server_installs_the_handler_that_is_replaced() -> None:
    source = inspect.getsource(entry.run_server)
    installed, served = source.index("signal.signal(signal.SIGTERM"), source.index("await run_ser")
    assert installed < served


@pytest.mark.parametrize(
    ("extend", "module"),
    [
        (shutdown_errors._extend_async_llm, async_llm),
        (shutdown_errors._extend_entry, entry),
    ],
)
def test_extended_once(extend: Any, module: ModuleType) -> None:
    shutdown_errors.install()
    names = ("AsyncLLM", "run_server_worker")
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

        errored = dead_error = check_admission = get_num_unfinished_requests = shutdown

    module = ModuleType("vllm.v1.engine.async_llm")
    module.AsyncLLM = AsyncLLM  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedVllmError, match="sets no attribute 'output_handler'"):
        shutdown_errors._extend_async_llm(module)

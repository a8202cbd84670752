# SPDX-License-Identifier: Apache-2.0
"""The end of a server: requests that are not finished get an error, and a failure has a status.

Leans on: ``AsyncLLM.shutdown`` is called, in any thread, when a server gets SIGTERM or SIGINT, and
once more, in the task that serves, when it is left. It ends the engine, unless another process
started it: ``engine_core.resources.engine_manager`` is then ``None``. ``AsyncLLM.check_admission``
is asked before a request is taken, and what it raises is the answer; so is ``AsyncLLM.dead_error``,
before that, once the engine is gone.
``OutputProcessor.propagate_error`` gives an exception to every request that waits.
``AsyncLLM.generate`` raises ``EngineDeadError`` once the engine is gone, for whatever reason, or
``EngineGenerateError`` where a socket to it is closed under a request; a renderer, which is closed
first, raises ``RuntimeError`` where it would start work in a thread. An engine that is told to end,
by its server or by a signal to all processes, sends its requests' last outputs with
``EngineCoreProc._send_abort_outputs_to_client``; its ``shutdown_state`` is then no longer
``RUNNING``. ``run_server`` turns SIGTERM into ``KeyboardInterrupt`` until the server listens, and
calls ``run_server_worker`` by the name of their module.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from http import HTTPStatus
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_spyre_mm.upstream.contract import (
    require_assigned,
    require_attributes,
    require_parameters,
)
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded
from vllm_spyre_mm.vllm_fixes.fault import Fault

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

FAULT = Fault(
    "vLLM's server forgets the requests that are under way when it is told to end, or answers them "
    "with HTTP 200 and the text so far, unless --shutdown-timeout is long enough for all of them, "
    "and with several API servers whatever it says; answers requests that come during that time "
    "with HTTP 500; exits with status 0 when its engine died; and loses a SIGTERM that comes while "
    "the engine starts.",
    seen_in="0.32.0",
)
REPLACED = (
    "vllm.v1.engine.async_llm.AsyncLLM.dead_error",
    "vllm.v1.engine.async_llm.AsyncLLM.shutdown",
    "vllm.v1.engine.core.EngineCoreProc._send_abort_outputs_to_client",
    "vllm.entrypoints.launchers.api_server.entry.run_server_worker",
)

INTERRUPTED = "the server was told to end before it was ready: no request was served"
SHUT_DOWN = "the server was shut down before this request was finished: send it to another one"
ENGINE_DIED = (
    "the engine's process ended unexpectedly, so the server ends too: the log says why, unless it "
    "was killed (out of memory, for instance)"
)

LAST_SECOND = 1.0
"""Seconds in which the errors of unfinished requests are sent: when ``--shutdown-timeout`` is over,
vLLM kills each of several API servers."""

engine_died: ContextVar[bool] = ContextVar("engine_died", default=False)
"""In the task that serves: whether its engine was found dead when it was left."""


def install() -> None:
    """Extend vLLM's engine, its client and its server as soon as they exist."""
    when_loaded("vllm.v1.engine.core", _extend_engine)
    when_loaded("vllm.v1.engine.async_llm", _extend_async_llm)
    when_loaded("vllm.entrypoints.launchers.api_server.entry", _extend_entry)


def _extend_async_llm(module: ModuleType) -> None:
    require_attributes(module, ("AsyncLLM",))
    engine = module.AsyncLLM
    if is_extended(engine.shutdown, __name__):
        return
    require_parameters(engine.shutdown, ("timeout",))
    require_attributes(
        engine, ("check_admission", "dead_error", "errored", "get_num_unfinished_requests")
    )
    require_assigned(engine.__init__, ("engine_core", "output_handler", "output_processor"))
    engine.shutdown = _ending_requests(engine.shutdown)
    engine.dead_error = property(_saying_why_it_is_dead(engine.dead_error.fget))


def _ending_requests(original: Callable[..., None]) -> Callable[..., None]:
    @extending(original, __name__)
    def shutdown(self: Any, timeout: float | None = None) -> None:
        is_first = not getattr(self, "shut_down", False)  # it is called again at the end
        self.shut_down = True
        if is_first:
            # Not where the engine's start failed: there is nothing that could have died yet.
            died = hasattr(self, "engine_core") and self.errored
            engine_died.set(died)
            self.told_to_end = not died
        self.check_admission = _refuse
        if is_first and timeout and self.engine_core.resources.engine_manager is None:
            _wait_for_requests(self, timeout)
        original(self, timeout=timeout)
        handler = getattr(self, "output_handler", None)
        if handler is None or handler.get_loop().is_closed():
            return  # nobody waits: no request ever came, or whoever asked is gone
        give_error = self.output_processor.propagate_error
        handler.get_loop().call_soon_threadsafe(give_error, _error())

    return shutdown


def _saying_why_it_is_dead(original: Callable[[Any], BaseException]) -> Callable[..., Any]:
    @extending(original, __name__)
    def dead_error(self: Any) -> BaseException:
        return _error() if getattr(self, "told_to_end", False) else original(self)

    return dead_error


def _refuse(*_: Any, **__: Any) -> NoReturn:
    """Admit no request to a server that ends.

    Raises:
        GracefulHTTPError: always (HTTP 503, or an event in a stream).
    """
    from vllm.exceptions import GracefulHTTPError

    raise GracefulHTTPError(SHUT_DOWN, HTTPStatus.SERVICE_UNAVAILABLE)


def _error() -> Exception:
    """What :func:`_refuse` raises."""
    from vllm.exceptions import GracefulHTTPError

    return GracefulHTTPError(SHUT_DOWN, HTTPStatus.SERVICE_UNAVAILABLE)


@contextlib.contextmanager
def shutdown_answered(owner: Any, *errors: type[Exception]) -> Iterator[None]:
    """In which a request is handled: what is gone because it was told to end did not fail.

    Args:
        owner: an engine or a renderer; ``told_to_end`` is true when its server ends.
        errors: what is raised by it when it is gone.

    Raises:
        GracefulHTTPError: it ended before the request did (HTTP 503).
    """
    try:
        yield
    except errors:
        if getattr(owner, "told_to_end", False):
            _refuse()
        raise


def raise_if_shut_down(output: "RequestOutput") -> None:
    """Raise an error instead of an output that the engine's end cut short.

    Raises:
        GracefulHTTPError: in place of the text so far (HTTP 503).
    """
    for completion in output.outputs:
        if completion.finish_reason == "abort" and completion.stop_reason == SHUT_DOWN:
            _refuse()


def _extend_engine(module: ModuleType) -> None:
    require_attributes(
        module,
        ("EngineCoreProc", "EngineShutdownState", "EngineCoreOutput", "EngineCoreOutputs"),
    )
    engine: Any = module.EngineCoreProc
    original = engine._send_abort_outputs_to_client
    if is_extended(original, __name__):
        return
    require_parameters(original, ("req_ids", "client_index"))
    require_assigned(engine.__init__, ("shutdown_state", "output_queue"))
    engine._send_abort_outputs_to_client = _giving_the_reason(original, module)


def _giving_the_reason(original: Callable[..., None], core: Any) -> Callable[..., None]:
    """The last outputs of requests that the engine's end cuts short say so as ``stop_reason``."""
    from vllm.v1.engine import FinishReason

    @extending(original, __name__)
    def _send_abort_outputs_to_client(self: Any, req_ids: list[str], client_index: int) -> None:
        if self.shutdown_state == core.EngineShutdownState.RUNNING:
            return original(self, req_ids, client_index)  # whoever ended them asked for it
        outputs = [
            core.EngineCoreOutput(
                req_id, [], finish_reason=FinishReason.ABORT, stop_reason=SHUT_DOWN
            )
            for req_id in req_ids
        ]
        ended = core.EngineCoreOutputs(finished_requests=set(req_ids), outputs=outputs)
        self.output_queue.put_nowait((client_index, ended))

    return _send_abort_outputs_to_client


def _wait_for_requests(engine: Any, timeout: float) -> None:
    """Wait until no request is unfinished, which vLLM does only where it ends the engine here.

    Args:
        engine: an ``AsyncLLM``; its event loop runs in another thread.
        timeout: seconds until this process is killed.
    """
    deadline = time.monotonic() + timeout - min(LAST_SECOND, timeout / 2)
    while engine.get_num_unfinished_requests() and time.monotonic() < deadline:
        time.sleep(0.05)


def _extend_entry(module: ModuleType) -> None:
    require_attributes(module, ("run_server", "run_server_worker"))
    original = module.run_server_worker
    if is_extended(original, __name__):
        return

    @extending(original, __name__)
    async def run_server_worker(*args: Any, **kwargs: Any) -> None:
        _end_at_signals(module.__name__)
        engine_died.set(False)
        try:
            await original(*args, **kwargs)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
        if engine_died.get():
            raise SystemExit(ENGINE_DIED)

    module.run_server_worker = run_server_worker  # type: ignore[attr-defined]


def _end_at_signals(entry: str) -> None:
    """Let SIGTERM and SIGINT end the start, where vLLM's own handler is there for SIGTERM.

    That one raises ``KeyboardInterrupt``, which vLLM swallows while it waits for the engine.

    Args:
        entry: name of the module whose handler is replaced; it stays until the server listens.
    """
    if getattr(signal.getsignal(signal.SIGTERM), "__module__", None) != entry:
        return  # an API server beside others, or a program that runs the server itself
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    raise SystemExit(INTERRUPTED)

# SPDX-License-Identifier: Apache-2.0
"""The end of a server: requests that are not finished get an error, and a failure has a status.

Leans on: ``AsyncLLM.shutdown`` is called, in any thread, when a server gets SIGTERM or SIGINT, and
ends the engine, unless another process started it: ``engine_core.resources.engine_manager`` is then
``None``. ``AsyncLLM.check_admission`` is asked before a request is taken, and what it raises is the
answer. ``OutputProcessor.propagate_error`` gives an exception to every request that waits.
``run_server`` turns SIGTERM into ``KeyboardInterrupt`` until the server listens and calls
``run_server_worker``, which awaits what ``build_and_serve`` returns, both by the names of their
module. The engine's start waits in a ``zmq_socket_ctx``, a name of its module, which swallows
``KeyboardInterrupt``.

By itself vLLM forgets requests that are under way when a server is told to end, unless
``--shutdown-timeout`` is long enough for all of them: they wait for ever, and the server for them.
With several API servers it forgets them whatever the flag says. A request that comes during that
time fails with HTTP 500. When its engine dies it exits with status 0. SIGTERM while the engine
starts is lost.
"""

import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator
from http import HTTPStatus
from types import ModuleType
from typing import Any

from vllm_spyre_mm.upstream.contract import (
    require_assigned,
    require_attributes,
    require_parameters,
)
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded

INTERRUPTED = "the server was told to end before it was ready: no request was served"
SHUT_DOWN = "the server was shut down before this request was finished: send it to another one"
ENGINE_DIED = (
    "the engine's process ended unexpectedly, so the server ends too: the log says why, unless it "
    "was killed (out of memory, for instance)"
)

LAST_SECOND = 1.0
"""Seconds in which the errors of unfinished requests are sent: when ``--shutdown-timeout`` is over,
vLLM kills each of several API servers."""


def install() -> None:
    """Extend vLLM's asynchronous engine and its server as soon as they exist."""
    when_loaded("vllm.v1.engine.async_llm", _extend_async_llm)
    when_loaded("vllm.v1.engine.utils", _let_interrupts_through)
    when_loaded("vllm.entrypoints.launchers.api_server.entry", _extend_entry)


def _extend_async_llm(module: ModuleType) -> None:
    require_attributes(module, ("AsyncLLM",))
    engine = module.AsyncLLM
    if is_extended(engine.shutdown, __name__):
        return
    require_parameters(engine.shutdown, ("timeout",))
    require_attributes(engine, ("check_admission", "get_num_unfinished_requests"))
    require_assigned(engine.__init__, ("engine_core", "output_handler", "output_processor"))
    engine.shut_down = False
    engine.shutdown = _ending_requests(engine.shutdown)


def _ending_requests(original: Callable[..., None]) -> Callable[..., None]:
    from vllm.exceptions import GracefulHTTPError

    @extending(original, __name__)
    def shutdown(self: Any, timeout: float | None = None) -> None:
        is_first, self.shut_down = not self.shut_down, True
        self.check_admission = _refuse
        if is_first and timeout and self.engine_core.resources.engine_manager is None:
            _wait_for_requests(self, timeout)
        original(self, timeout=timeout)
        handler = getattr(self, "output_handler", None)
        if handler is None or handler.get_loop().is_closed():
            return  # nobody waits: no request ever came, or whoever asked is gone
        error = GracefulHTTPError(SHUT_DOWN, HTTPStatus.SERVICE_UNAVAILABLE)
        handler.get_loop().call_soon_threadsafe(self.output_processor.propagate_error, error)

    return shutdown


def _refuse(*_: Any, **__: Any) -> None:
    """Admit no request to a server that ends.

    Raises:
        GracefulHTTPError: always (HTTP 503).
    """
    from vllm.exceptions import GracefulHTTPError

    raise GracefulHTTPError(SHUT_DOWN, HTTPStatus.SERVICE_UNAVAILABLE)


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
    require_attributes(module, ("build_and_serve", "run_server", "run_server_worker"))
    if is_extended(module.build_and_serve, __name__):
        return
    require_parameters(module.build_and_serve, ("engine_client",))
    build, run = module.build_and_serve, module.run_server_worker

    @extending(build, __name__)
    async def build_and_serve(engine_client: Any, *args: Any, **kwargs: Any) -> Any:
        ending = await build(engine_client, *args, **kwargs)
        died = engine_client.errored and not engine_client.shut_down
        return _failing(ending) if died else ending

    @extending(run, __name__)
    async def run_server_worker(*args: Any, **kwargs: Any) -> None:
        try:
            await run(*args, **kwargs)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None

    module.build_and_serve = build_and_serve  # type: ignore[attr-defined]
    module.run_server_worker = run_server_worker  # type: ignore[attr-defined]


async def _failing(ending: Coroutine[Any, Any, None]) -> None:
    """Wait for the server's end, then leave with status 1.

    Raises:
        SystemExit: with a sentence, which Python prints.
    """
    await ending
    raise SystemExit(ENGINE_DIED)


def _let_interrupts_through(module: ModuleType) -> None:
    require_attributes(module, ("launch_core_engines", "zmq_socket_ctx"))
    original = module.zmq_socket_ctx
    if is_extended(original, __name__):
        return

    @extending(original, __name__)
    @contextlib.contextmanager
    def zmq_socket_ctx(*args: Any, **kwargs: Any) -> Iterator[Any]:
        interrupt = None
        with original(*args, **kwargs) as socket:
            try:
                yield socket
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    module.zmq_socket_ctx = zmq_socket_ctx  # type: ignore[attr-defined]

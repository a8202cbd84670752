# SPDX-License-Identifier: Apache-2.0
"""What ``AsyncLLM`` does for servers: embeddings for HTTP, and none unasked.

A request that says nothing of ``return_mm_embedding`` gets what the settings say where a program
makes it. In a server nobody would see it: whatever way a request came in, one that says nothing
wants none.

Leans on: servers make their engine with a ``usage_context`` of their own, and it has the
``input_processor`` that makes all its requests; ``generate`` is called in the context of an HTTP
request, once for each prompt or conversation in their order, and yields every output.
"""

import contextlib
import inspect
from collections.abc import AsyncGenerator, Callable
from types import ModuleType
from typing import Any

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.frontend.http.exchange import EXCHANGE
from vllm_spyre_mm.frontend.input_processor import RETURNS_UNASKED
from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded
from vllm_spyre_mm.vllm_fixes.request_errors import raise_reason
from vllm_spyre_mm.vllm_fixes.shutdown_errors import raise_if_shut_down, shutdown_answered

REPLACED = (
    "vllm.v1.engine.async_llm.AsyncLLM.__init__",
    "vllm.v1.engine.async_llm.AsyncLLM.generate",
)
"""Attributes of vLLM's that are replaced."""


def install() -> None:
    """Extend vLLM's asynchronous engine as soon as it exists."""
    when_loaded("vllm.v1.engine.async_llm", _extend_async_llm)


def _extend_async_llm(module: ModuleType) -> None:
    require_attributes(module, ("AsyncLLM",))
    engine = module.AsyncLLM
    require_attributes(engine, ("generate",))
    if not is_extended(engine.__init__, __name__):
        require_parameters(engine.__init__, ("vllm_config", "usage_context"))
        engine.__init__ = _knowing_its_user(engine.__init__)
    if not is_extended(engine.generate, __name__):
        require_parameters(engine.generate, ("prompt", "sampling_params"))
        engine.generate = _serving(engine.generate)


def _knowing_its_user(original: Callable[..., None]) -> Callable[..., None]:
    from vllm.usage.usage_lib import UsageContext

    in_python = (UsageContext.ENGINE_CONTEXT, UsageContext.LLM_CLASS)

    @extending(original, __name__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        context = given.get("usage_context", UsageContext.ENGINE_CONTEXT)
        if context is UsageContext.OPENAI_BATCH_RUNNER:
            _refuse_embeddings(given["vllm_config"])
        original(self, *args, **kwargs)
        if context not in in_python:
            setattr(self.input_processor, RETURNS_UNASKED, False)

    return __init__


def _refuse_embeddings(vllm_config: Any) -> None:
    """``vllm run-batch`` calls the handlers of a server without its HTTP, which has the field.

    Raises:
        ValueError: they would be returned.
    """
    if SpyreSettings.from_vllm_config(vllm_config).enable_return_mm_embedding:
        raise ValueError(
            "vllm run-batch returns no embeddings: start it without enable_return_mm_embedding, "
            "or ask a server, or run vllm-spyre-mm embed"
        )


def _serving(original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., Any]:
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    @extending(original, __name__)
    def generate(
        self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        exchange, first = EXCHANGE.get(), 0
        if exchange is not None:
            settings = SpyreSettings.from_vllm_config(self.vllm_config)
            sampling_params, first = exchange.begin(sampling_params, settings)

        async def outputs() -> AsyncGenerator[Any, None]:
            generated = original(self, prompt, sampling_params, *args, **kwargs)
            async with contextlib.AsyncExitStack() as stack:
                stack.enter_context(shutdown_answered(self, EngineDeadError, EngineGenerateError))
                await stack.enter_async_context(contextlib.aclosing(generated))
                async for output in generated:
                    raise_if_shut_down(output)
                    raise_reason(output)
                    if exchange is not None:
                        exchange.note(output.outputs, first)
                    yield output

        return outputs()

    return generate

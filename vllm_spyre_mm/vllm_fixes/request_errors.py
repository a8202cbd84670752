# SPDX-License-Identifier: Apache-2.0
"""Tells a client why its request failed.

Leans on: ``AsyncLLM.generate`` yields every output of a request that came over HTTP; the
OpenAI-compatible server answers a ``GenerationError`` with its text, in a stream too. By itself
vLLM answers every request that ends with ``finish_reason`` ``"error"`` with ``Internal server
error``; here the engine gives a reason with it, as ``stop_reason``.
"""

import contextlib
from collections.abc import AsyncGenerator, Callable
from types import ModuleType
from typing import Any

from vllm_spyre_mm.upstream.contract import require_attributes
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded


def install() -> None:
    """Extend vLLM's asynchronous engine as soon as it exists."""
    when_loaded("vllm.v1.engine.async_llm", _extend_async_llm)


def _extend_async_llm(module: ModuleType) -> None:
    require_attributes(module, ("AsyncLLM",))
    if not is_extended(module.AsyncLLM.generate, __name__):
        module.AsyncLLM.generate = _raising_reason(module.AsyncLLM.generate)


def _raising_reason(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.exceptions import GenerationError

    @extending(original, __name__)
    async def generate(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        outputs = original(self, *args, **kwargs)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                for completion in output.outputs:
                    if completion.finish_reason == "error" and completion.stop_reason:
                        raise GenerationError(f"the request failed: {completion.stop_reason}")
                yield output

    return generate

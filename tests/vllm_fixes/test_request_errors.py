# SPDX-License-Identifier: Apache-2.0
"""A request that failed with a reason raises it where vLLM would say that something failed."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from vllm.exceptions import GenerationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine import async_llm

from vllm_spyre_mm.upstream.marks import is_extended
from vllm_spyre_mm.vllm_fixes import request_errors


def output(finish_reason: str | None, stop_reason: str | None) -> RequestOutput:
    ended = CompletionOutput(
        0, "", [], None, None, finish_reason=finish_reason, stop_reason=stop_reason
    )
    return RequestOutput("a", "prompt", [1], None, [ended], finish_reason is not None)


class Engine:
    """Gives outputs as ``AsyncLLM.generate`` does, and notes whether the generator was closed."""

    def __init__(self, *outputs: RequestOutput) -> None:
        self.outputs, self.closed = outputs, False

    async def generate(self, prompt: str) -> AsyncGenerator[RequestOutput, None]:
        try:
            for each in self.outputs:
                yield each
        finally:
            self.closed = True


async def collect(engine: Engine) -> list[RequestOutput]:
    wrapped: Any = request_errors._raising_reason(Engine.generate)
    return [each async for each in wrapped(engine, "prompt")]


def test_the_reason_is_raised_and_the_request_is_closed() -> None:
    engine = Engine(output(None, None), output("error", "because"), output(None, None))
    with pytest.raises(GenerationError, match=r"^the request failed: because$"):
        asyncio.run(collect(engine))
    assert engine.closed


@pytest.mark.parametrize(
    "last", [output("stop", "END"), output("error", None), output("length", None)]
)
def test_other_ends_are_vllms(last: RequestOutput) -> None:
    engine = Engine(output(None, None), last)
    assert asyncio.run(collect(engine)) == list(engine.outputs)


def test_a_consumer_that_leaves_closes_the_request_at_once() -> None:
    """The client went away: vLLM aborts a request when its generator is closed."""
    engine = Engine(output(None, None), output(None, None))

    async def leave() -> bool:
        wrapped: Any = request_errors._raising_reason(Engine.generate)
        outputs = wrapped(engine, "prompt")
        await anext(outputs)
        await outputs.aclose()
        return engine.closed

    assert asyncio.run(leave())


def test_wrapped_once() -> None:
    request_errors.install()
    before = async_llm.AsyncLLM.generate
    request_errors.install()
    assert async_llm.AsyncLLM.generate is before
    assert is_extended(before, request_errors.__name__)

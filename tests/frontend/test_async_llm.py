# SPDX-License-Identifier: Apache-2.0
"""Who gets an embedding unasked, and what an HTTP request that asks gets; reasons of failures."""

import asyncio
from collections.abc import AsyncGenerator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import GenerationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import async_llm as vllm_async_llm
from vllm.v1.engine.input_processor import InputProcessor

from vllm_spyre_mm.frontend import async_llm
from vllm_spyre_mm.frontend.hooks import install
from vllm_spyre_mm.frontend.http.exchange import EXCHANGE, Exchange
from vllm_spyre_mm.frontend.input_processor import decline_unless_asked
from vllm_spyre_mm.multimodal.embedding import MMEmbeddingInfo
from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice
from vllm_spyre_mm.upstream.marks import is_extended

ON = {"enable_return_mm_embedding": True, "max_mm_embedding_response_bytes": 1000}


def request(extra_args: dict[str, Any] | None, images: int = 1, **fields: Any) -> Any:
    params = SamplingParams(extra_args=extra_args, **fields)
    return SimpleNamespace(sampling_params=params, mm_features=[object()] * images)


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}, {"return_mm_embedding": None}])
def test_a_request_that_says_nothing_says_no(extra_args: Any) -> None:
    made = request(extra_args)
    params = made.sampling_params
    decline_unless_asked(made, returns_unasked=False)
    assert made.sampling_params.extra_args == {**(extra_args or {}), "return_mm_embedding": False}
    assert params.extra_args == extra_args  # they may be the caller's, and used again


@pytest.mark.parametrize("value", [True, False, 1, {"pooling": "image"}])
def test_a_request_that_says_something_is_not_touched(value: Any) -> None:
    made = request({"return_mm_embedding": value})
    params = made.sampling_params
    decline_unless_asked(made, returns_unasked=False)
    assert made.sampling_params is params


def test_nor_is_one_without_images_or_that_pools() -> None:
    made = request(None, images=0)
    decline_unless_asked(made, returns_unasked=False)
    assert made.sampling_params.extra_args is None
    pooling = SimpleNamespace(sampling_params=None, mm_features=[object()])
    decline_unless_asked(pooling, returns_unasked=False)


def test_parameters_that_vllm_made_for_one_request_of_its_own() -> None:
    """A beam search's, or those of a handler of a server."""
    made, of_a_program = request(None, skip_clone=True), request(None)
    for each in (made, of_a_program):
        decline_unless_asked(each, returns_unasked=True)
    assert made.sampling_params.extra_args == {"return_mm_embedding": False}
    assert of_a_program.sampling_params.extra_args is None


def test_the_default_of_an_input_processor() -> None:
    install()
    assert InputProcessor.returns_unasked


@pytest.mark.parametrize(
    ("context", "unasked_for"),
    [
        *((context, False) for context in UsageContext),
        (UsageContext.ENGINE_CONTEXT, True),
        (UsageContext.LLM_CLASS, True),
        (None, True),
    ],
)
def test_an_engine_by_who_made_it(context: Any, unasked_for: bool) -> None:
    if not unasked_for and context in (UsageContext.ENGINE_CONTEXT, UsageContext.LLM_CLASS):
        return

    class Engine:
        def __init__(
            self, vllm_config: Any, usage_context: UsageContext = UsageContext.ENGINE_CONTEXT
        ) -> None:
            self.input_processor = SimpleNamespace(returns_unasked=True)

        def generate(self, prompt: Any, sampling_params: Any) -> Any:
            """Nothing is generated."""

    module = ModuleType("vllm.v1.engine.async_llm")
    module.AsyncLLM = Engine
    async_llm._extend_async_llm(module)
    async_llm._extend_async_llm(module)  # harmless
    config = SimpleNamespace(additional_config={})
    made = Engine(config) if context is None else Engine(config, context)
    assert made.input_processor.returns_unasked is unasked_for


def test_vllms_batches_are_refused_embeddings_that_they_would_not_return() -> None:
    def __init__(
        self: Any, vllm_config: Any, usage_context: UsageContext = UsageContext.ENGINE_CONTEXT
    ) -> None:
        self.input_processor = SimpleNamespace()

    made: Any = async_llm._knowing_its_user(__init__)
    on = SimpleNamespace(additional_config=ON)
    with pytest.raises(ValueError, match="run-batch returns no embeddings"):
        made(SimpleNamespace(), on, usage_context=UsageContext.OPENAI_BATCH_RUNNER)
    made(SimpleNamespace(), on, usage_context=UsageContext.OPENAI_API_SERVER)


# -- HTTP ------------------------------------------------------------------------------------------


class Serving:
    """Answers each prompt with ``n`` outputs, of which the last has no image."""

    vllm_config = SimpleNamespace(additional_config=ON)

    def __init__(self) -> None:
        self.told: list[Any] = []

    async def generate(self, prompt: str, sampling_params: SamplingParams) -> AsyncGenerator:
        self.told.append((sampling_params.extra_args or {}).get("return_mm_embedding"))
        for finish_reason in (None, "stop"):
            outputs = [
                CompletionOutput(i, prompt, [], None, None, finish_reason=finish_reason)
                for i in range(sampling_params.n)
            ]
            for output in outputs[: len(outputs) - (prompt == "text")]:
                output.mm_embedding = torch.ones(1, 1)
                output.mm_embedding_info = MMEmbeddingInfo(items=[], pooling="raw", scales=None)
            yield RequestOutput("a", prompt, [1], None, outputs, finish_reason is not None)


async def serve(exchange: Exchange | None, prompts: str, **sampling: Any) -> Serving:
    """Answer prompts in the context of an HTTP request, those that came last first."""
    engine = Serving()
    generate: Any = async_llm._serving(Serving.generate)
    reset = EXCHANGE.set(exchange)
    given = SamplingParams(**sampling)
    answers = [generate(engine, prompt, given) for prompt in prompts.split()]
    EXCHANGE.reset(reset)
    for answer in reversed(answers):
        async for _ in answer:
            pass
    assert given.extra_args is None
    return engine


def test_embeddings_are_noted_by_the_index_of_their_answer() -> None:
    exchange = Exchange(EmbeddingChoice(), conversations=2)
    engine = asyncio.run(serve(exchange, "image text image", n=2))
    values = [exchange.value(index) for index in range(7)]
    assert [value is not None for value in values] == [True, True, True, False, True, True, False]
    assert len(set(values) - {None}) == 5
    assert [told["max_bytes"] for told in engine.told] == [250] * 3
    assert exchange.pending


def test_an_http_request_that_does_not_ask_gets_none() -> None:
    exchange = Exchange()
    assert asyncio.run(serve(exchange, "image")).told == [False]
    assert exchange.value(0) is None
    assert not exchange.pending


def test_without_http_an_engine_is_told_what_its_caller_says() -> None:
    assert asyncio.run(serve(None, "image")).told == [None]


# -- failures --------------------------------------------------------------------------------------


def output(finish_reason: str | None, stop_reason: str | None) -> RequestOutput:
    ended = CompletionOutput(
        0, "", [], None, None, finish_reason=finish_reason, stop_reason=stop_reason
    )
    return RequestOutput("a", "prompt", [1], None, [ended], finish_reason is not None)


class Engine:
    """Gives outputs as ``AsyncLLM.generate`` does, and notes whether the generator was closed."""

    def __init__(self, *outputs: RequestOutput) -> None:
        self.outputs, self.closed = outputs, False

    async def generate(
        self, prompt: str, sampling_params: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        try:
            for each in self.outputs:
                yield each
        finally:
            self.closed = True


async def collect(engine: Engine) -> list[RequestOutput]:
    wrapped: Any = async_llm._serving(Engine.generate)
    return [each async for each in wrapped(engine, "prompt", None)]


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
        wrapped: Any = async_llm._serving(Engine.generate)
        outputs = wrapped(engine, "prompt", None)
        await anext(outputs)
        await outputs.aclose()
        return engine.closed

    assert asyncio.run(leave())


# -- installing ------------------------------------------------------------------------------------


def test_wrapped_once() -> None:
    install()
    engine = vllm_async_llm.AsyncLLM
    before = engine.generate, engine.__init__
    async_llm.install()
    assert (engine.generate, engine.__init__) == before
    assert all(is_extended(each, async_llm.__name__) for each in before)

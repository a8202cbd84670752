# SPDX-License-Identifier: Apache-2.0
"""A request that says nothing gets an embedding in Python, none in a server or a beam search."""

import asyncio
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.entrypoints.generate import api_router
from vllm.entrypoints.launchers.api_server import app_state
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from vllm_spyre_mm.frontend import unasked
from vllm_spyre_mm.frontend.hooks import install
from vllm_spyre_mm.frontend.unasked import decline_unless_asked
from vllm_spyre_mm.upstream.marks import is_extended


def request(extra_args: dict[str, Any] | None, images: int = 1) -> Any:
    params = SamplingParams(extra_args=extra_args)
    return SimpleNamespace(sampling_params=params, mm_features=[object()] * images)


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}, {"return_mm_embedding": None}])
def test_a_request_that_says_nothing_says_no(extra_args: Any) -> None:
    made = request(extra_args)
    params = made.sampling_params
    decline_unless_asked(made)
    assert made.sampling_params.extra_args == {**(extra_args or {}), "return_mm_embedding": False}
    assert params.extra_args == extra_args  # they may be the caller's, and used again


@pytest.mark.parametrize("value", [True, False, 1, {"pooling": "image"}])
def test_a_request_that_says_something_is_not_touched(value: Any) -> None:
    made = request({"return_mm_embedding": value})
    params = made.sampling_params
    decline_unless_asked(made)
    assert made.sampling_params is params


def test_nor_is_one_without_images_or_that_pools() -> None:
    made = request(None, images=0)
    decline_unless_asked(made)
    assert made.sampling_params.extra_args is None
    decline_unless_asked(SimpleNamespace(sampling_params=None, mm_features=[object()]))


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
            self, config: Any, usage_context: UsageContext = UsageContext.ENGINE_CONTEXT
        ) -> None:
            self.input_processor = SimpleNamespace(returns_unasked=True)

    module = ModuleType("vllm.v1.engine.async_llm")
    module.AsyncLLM = Engine
    unasked._extend_async_llm(module)
    unasked._extend_async_llm(module)  # harmless
    made = Engine("config") if context is None else Engine("config", context)
    assert made.input_processor.returns_unasked is unasked_for


def test_an_engine_that_gets_routes() -> None:
    seen = []

    async def init_generate_state(engine_client: Any, state: Any, args: Any) -> None:
        seen.append((engine_client.input_processor.returns_unasked, state, args))

    module = ModuleType("api_router")
    module.init_generate_state = init_generate_state
    unasked._extend_routes(module)
    engine = SimpleNamespace(input_processor=SimpleNamespace(returns_unasked=True))
    asyncio.run(module.init_generate_state(engine, "state", args="args"))
    assert seen == [(False, "state", "args")]


@pytest.mark.parametrize("fails", [False, True])
def test_a_beam_search(fails: bool) -> None:
    class Mixin:
        def __init__(self) -> None:
            processor = SimpleNamespace(returns_unasked=True)
            self.llm_engine = SimpleNamespace(input_processor=processor)

        def beam_search(self, prompts: Any) -> Any:
            if fails:
                raise ValueError("refused")
            return self.llm_engine.input_processor.returns_unasked

    module = ModuleType("offline")
    module.BeamSearchOfflineMixin = Mixin
    unasked._extend_beam_search(module)
    llm = Mixin()
    if fails:
        with pytest.raises(ValueError, match="refused"):
            llm.beam_search("prompts")
    else:
        assert llm.beam_search("prompts") is False
    assert llm.llm_engine.input_processor.returns_unasked is True


def test_vllm_has_all_of_it() -> None:
    install()
    for extended in (AsyncLLM.__init__, api_router.init_generate_state, LLM.beam_search):
        assert is_extended(extended, unasked.__name__)
    # It is imported where it is called: whoever has init_app_state already calls the extended one.
    assert not hasattr(app_state, "init_generate_state")

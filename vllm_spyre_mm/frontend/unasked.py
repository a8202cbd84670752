# SPDX-License-Identifier: Apache-2.0
"""Who gets an embedding without asking: callers in Python of an engine of their own.

A request that says nothing of ``return_mm_embedding`` gets what the settings say where a program
makes it. In a server nobody would see it: whatever route a request came in by, one that says
nothing wants none. Nor do the requests of one token each that a beam search is made of.

Leans on: servers make their engine with a ``usage_context`` of their own; ``init_app_state``, which
joins an engine with vLLM's routes wherever it comes from, calls ``init_generate_state`` with it, by
the name of its module; an engine has the ``input_processor`` that makes all its requests;
``LLM.beam_search`` makes its own before it returns.
"""

import copy
import inspect
from types import ModuleType
from typing import Any

from vllm_spyre_mm.multimodal.embedding import EXTRA_ARG
from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded

ATTRIBUTE = "returns_unasked"
"""Of an input processor: whether the settings' default applies to its requests (it does unless
this says no: see ``input_processor``)."""


def install() -> None:
    """Extend vLLM's front ends as soon as they exist."""
    when_loaded("vllm.v1.engine.async_llm", _extend_async_llm)
    when_loaded("vllm.entrypoints.generate.api_router", _extend_routes)
    when_loaded("vllm.entrypoints.generate.beam_search.offline", _extend_beam_search)


def decline_unless_asked(request: Any) -> None:
    """Make a request that says nothing say that it wants no embedding, in place.

    Args:
        request: vLLM's ``EngineCoreRequest``; its parameters may be its caller's.
    """
    params = request.sampling_params
    if params is None or not request.mm_features:
        return
    if (params.extra_args or {}).get(EXTRA_ARG) is None:
        request.sampling_params = copy.copy(params)
        request.sampling_params.extra_args = {**(params.extra_args or {}), EXTRA_ARG: False}


def _extend_async_llm(module: ModuleType) -> None:
    from vllm.usage.usage_lib import UsageContext

    require_attributes(module, ("AsyncLLM",))
    original = module.AsyncLLM.__init__
    if is_extended(original, __name__):
        return
    require_parameters(original, ("usage_context",))
    in_python = (UsageContext.ENGINE_CONTEXT, UsageContext.LLM_CLASS)

    @extending(original, __name__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given = inspect.signature(original).bind(self, *args, **kwargs)
        if given.arguments.get("usage_context", in_python[0]) not in in_python:
            setattr(self.input_processor, ATTRIBUTE, False)

    module.AsyncLLM.__init__ = __init__


def _extend_routes(module: ModuleType) -> None:
    require_attributes(module, ("init_generate_state",))
    original = module.init_generate_state
    if is_extended(original, __name__):
        return
    require_parameters(original, ("engine_client", "state"))

    @extending(original, __name__)
    async def init_generate_state(engine_client: Any, *args: Any, **kwargs: Any) -> None:
        setattr(engine_client.input_processor, ATTRIBUTE, False)
        await original(engine_client, *args, **kwargs)

    module.init_generate_state = init_generate_state  # type: ignore[attr-defined]


def _extend_beam_search(module: ModuleType) -> None:
    require_attributes(module, ("BeamSearchOfflineMixin",))
    mixin = module.BeamSearchOfflineMixin
    original = mixin.beam_search
    if is_extended(original, __name__):
        return

    @extending(original, __name__)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        processor = self.llm_engine.input_processor
        before = getattr(processor, ATTRIBUTE)
        setattr(processor, ATTRIBUTE, False)
        try:
            return original(self, *args, **kwargs)
        finally:
            setattr(processor, ATTRIBUTE, before)

    mixin.beam_search = beam_search

# SPDX-License-Identifier: Apache-2.0
"""Checks a request after vLLM's front end has expanded its placeholders, before the engine.

Leans on: ``InputProcessor.process_inputs`` returns every ``EngineCoreRequest``, which vLLM hands to
the engine next, and has the ``vllm_config``. An exception from it fails that request alone
(HTTP 400).
"""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_spyre_mm.frontend.request_validation import (
    prepare_embedding,
    validate_engine_request,
)
from vllm_spyre_mm.multimodal.embedding_choice import EXTRA_ARG
from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded

REPLACED = ("vllm.v1.engine.input_processor.InputProcessor.process_inputs",)
"""Attributes of vLLM's that are replaced."""

RETURNS_UNASKED = "returns_unasked"
"""Of an input processor: whether the settings' default applies to its requests (it does unless
this says no: see ``async_llm``)."""


def install() -> None:
    """Extend vLLM's input processor as soon as it exists."""
    when_loaded("vllm.v1.engine.input_processor", _extend_input_processor)


def _extend_input_processor(module: ModuleType) -> None:
    require_attributes(module, ("InputProcessor",))
    processor = module.InputProcessor
    if is_extended(processor.process_inputs, __name__):
        return
    require_parameters(processor.process_inputs, ("request_id", "prompt", "params", "resumable"))
    require_parameters(processor.__init__, ("vllm_config",))
    setattr(processor, RETURNS_UNASKED, True)
    processor.process_inputs = _checking(processor.process_inputs)


def _checking(original: Callable[..., Any]) -> Callable[..., Any]:
    @extending(original, __name__)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        validate_engine_request(request, self.vllm_config.model_config)
        decline_unless_asked(request, returns_unasked=getattr(self, RETURNS_UNASKED))
        prepare_embedding(request, self.vllm_config)
        return request

    return process_inputs


def decline_unless_asked(request: Any, *, returns_unasked: bool) -> None:
    """Make a request that says nothing say that it wants no embedding, in place.

    Those of one token each that a beam search is made of show theirs to nobody: vLLM makes their
    parameters itself, and says so with ``skip_clone``, as servers do.

    Args:
        request: vLLM's ``EngineCoreRequest``; its parameters may be its caller's.
        returns_unasked: whether the settings' default applies to the others.
    """
    params = request.sampling_params
    if params is None or not request.mm_features or (returns_unasked and not params.skip_clone):
        return
    if (params.extra_args or {}).get(EXTRA_ARG) is None:
        request.sampling_params = copy.copy(params)
        request.sampling_params.extra_args = {**(params.extra_args or {}), EXTRA_ARG: False}

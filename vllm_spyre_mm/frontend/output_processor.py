# SPDX-License-Identifier: Apache-2.0
"""Shows the embedding on ``CompletionOutput.mm_embedding``.

Leans on: ``OutputProcessor.process_outputs`` handles every output of the engine and keeps a
``RequestState`` for each request; ``RequestState._new_completion_output`` makes every
``CompletionOutput`` of a generation, a dataclass; ``RequestOutput.add`` merges streamed outputs
field by field.

The engine sends the embedding with a request's first output, because the front end may end the
request by itself (stop strings) and the engine's last output then never comes. It is kept in the
request's state, and shown on the output that carries ``finish_reason``.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import torch
from vllm.outputs import CompletionOutput as VllmCompletionOutput

from vllm_spyre_mm.multimodal.embedding import MMEmbeddingInfo
from vllm_spyre_mm.upstream.contract import require, require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded

ATTRIBUTE = "mm_embedding"

REPLACED = (
    "vllm.outputs.RequestOutput.add",
    "vllm.v1.engine.output_processor.OutputProcessor.process_outputs",
    "vllm.v1.engine.output_processor.RequestState._new_completion_output",
)
"""Attributes of vLLM's that are replaced."""


class CompletionOutput(VllmCompletionOutput):
    """vLLM's output of one answer, whose text shows the embedding's shape and dtype."""

    mm_embedding: torch.Tensor | None
    mm_embedding_info: MMEmbeddingInfo | None

    def __repr__(self) -> str:
        embedding = self.mm_embedding
        shown = (
            None if embedding is None else f"Tensor({tuple(embedding.shape)}, {embedding.dtype})"
        )
        return f"{super().__repr__().removesuffix(')')}, {ATTRIBUTE}={shown})"


def install() -> None:
    """Extend vLLM's front end classes as soon as they exist."""
    when_loaded("vllm.outputs", _extend_outputs)
    when_loaded("vllm.v1.engine.output_processor", _extend_output_processor)


def _extend_outputs(module: ModuleType) -> None:
    require_attributes(module, ("CompletionOutput", "RequestOutput"))
    completion, request = module.CompletionOutput, module.RequestOutput
    if is_extended(request.add, __name__):
        return
    _require_no_embedding(completion)
    require_parameters(request.add, ("next_output", "aggregate"))
    completion.mm_embedding = completion.mm_embedding_info = None
    request.add = _keeping_embedding(request.add)


def _require_no_embedding(cls: type) -> None:
    """A vLLM that has the attribute fills it in a way of its own."""
    require(not hasattr(cls, ATTRIBUTE), f"{cls.__name__} has {ATTRIBUTE!r} of its own")


def _keeping_embedding(original: Callable[..., None]) -> Callable[..., None]:
    @extending(original, __name__)
    def add(self: Any, next_output: Any, aggregate: bool) -> None:
        original(self, next_output, aggregate)
        finished = {
            completion.index: completion
            for completion in next_output.outputs
            if completion.mm_embedding is not None
        }
        for completion in self.outputs if finished else ():
            if completion.index in finished:
                completion.mm_embedding = finished[completion.index].mm_embedding
                completion.mm_embedding_info = finished[completion.index].mm_embedding_info

    return add


def _extend_output_processor(module: ModuleType) -> None:
    require_attributes(module, ("OutputProcessor", "RequestState"))
    state, processor = module.RequestState, module.OutputProcessor
    if is_extended(processor.process_outputs, __name__):
        return
    _require_no_embedding(state)
    require_parameters(processor.process_outputs, ("engine_core_outputs",))
    require_parameters(state._new_completion_output, ("token_ids", "finish_reason", "stop_reason"))
    state.mm_embedding = state.mm_embedding_info = None
    processor.process_outputs = _receiving_embedding(processor.process_outputs)
    state._new_completion_output = _finishing_with_embedding(state._new_completion_output)


def _receiving_embedding(original: Callable[..., Any]) -> Callable[..., Any]:
    @extending(original, __name__)
    def process_outputs(
        self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        for output in engine_core_outputs:
            embedding = getattr(output, ATTRIBUTE, None)
            if embedding is not None and output.request_id in self.request_states:
                state = self.request_states[output.request_id]
                state.mm_embedding = _owned(embedding)
                info = output.mm_embedding_info
                if info is not None and info.scales is not None:
                    info = msgspec.structs.replace(info, scales=_owned(info.scales))
                state.mm_embedding_info = info
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of PyTorch's: a message frame is not to be kept alive."""
    if tensor.untyped_storage().resizable():
        return tensor
    owned = torch.empty_like(tensor)
    # By one thread: PyTorch's copy wakes several, which wait for more afterwards and take the cores
    # from the engine's, all of which wait for the one that lost its own.
    np.copyto(owned.view(torch.uint8).numpy(), tensor.view(torch.uint8).numpy())
    return owned


def _finishing_with_embedding(original: Callable[..., Any]) -> Callable[..., Any]:
    @extending(original, __name__)
    def _new_completion_output(
        self: Any, token_ids: list[int], finish_reason: Any, stop_reason: Any
    ) -> Any:
        made = original(self, token_ids, finish_reason, stop_reason)
        completion = CompletionOutput(**vars(made))
        if finish_reason is not None:
            completion.mm_embedding = self.mm_embedding
            completion.mm_embedding_info = self.mm_embedding_info
        return completion

    return _new_completion_output

# SPDX-License-Identifier: Apache-2.0
"""Shows the embedding on ``CompletionOutput.mm_embedding``.

Leans on: ``OutputProcessor.process_outputs`` handles every output of the engine and keeps a
``RequestState`` for each request; ``RequestState._new_completion_output`` makes every
``CompletionOutput`` of a generation, a dataclass; ``RequestOutput.add`` merges a streamed output
into one that nobody has read yet, and its ``finish_reason`` with it.

The engine sends the embedding with a request's first output, because the front end may end the
request by itself (stop strings) and the engine's last output then never comes. Every output of the
request refers to it, and shows it once the output has a ``finish_reason``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import torch
from vllm.outputs import CompletionOutput as VllmCompletionOutput

from vllm_spyre_mm.multimodal.embedding import MMEmbeddingInfo
from vllm_spyre_mm.upstream.contract import require, require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended, mark
from vllm_spyre_mm.upstream.module_loading import when_loaded

ATTRIBUTE = "mm_embedding"

REPLACED = (
    "vllm.v1.engine.output_processor.OutputProcessor.process_outputs",
    "vllm.v1.engine.output_processor.RequestState._new_completion_output",
)
"""Attributes of vLLM's that are replaced."""


@dataclass(slots=True)
class ReturnedEmbedding:
    """What a request returns, shared by all outputs of its answer.

    Attributes:
        embedding: ``(num_features, hidden_size)``; None once somebody has dropped it.
        info: the item that each of its rows belongs to.
    """

    embedding: torch.Tensor | None
    info: MMEmbeddingInfo | None


class CompletionOutput(VllmCompletionOutput):
    """vLLM's output of one answer, which shows the request's embedding once the answer has ended.

    Also where vLLM merges the end of the answer into an output that was made before it.

    Attributes:
        returned: what the request returns; None if it is nothing.
    """

    returned: ReturnedEmbedding | None = None

    @property
    def mm_embedding(self) -> torch.Tensor | None:
        """The request's embedding; None before the answer's end, or if it returns none.

        Whoever sets it to None drops it, for all outputs of the answer.
        """
        ended = self.finish_reason is not None
        return self.returned.embedding if ended and self.returned is not None else None

    @mm_embedding.setter
    def mm_embedding(self, embedding: torch.Tensor | None) -> None:
        if self.returned is None:
            self.returned = ReturnedEmbedding(None, None)
        self.returned.embedding = embedding

    @property
    def mm_embedding_info(self) -> MMEmbeddingInfo | None:
        """The item that each row of the embedding belongs to; None without one."""
        ended = self.finish_reason is not None
        return self.returned.info if ended and self.returned is not None else None

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: a part of an answer travels without the embedding."""
        return vars(self) if self.finish_reason is not None else vars(self) | {"returned": None}

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
    """Outputs that others construct have no embedding."""
    require_attributes(module, ("CompletionOutput",))
    completion = module.CompletionOutput
    if is_extended(completion, __name__):
        return
    # A vLLM that has the attribute fills it in a way of its own.
    require(
        not hasattr(completion, ATTRIBUTE), f"{completion.__name__} has {ATTRIBUTE!r} of its own"
    )
    completion.mm_embedding = completion.mm_embedding_info = None
    mark(completion, __name__)


def _extend_output_processor(module: ModuleType) -> None:
    require_attributes(module, ("OutputProcessor", "RequestState"))
    state, processor = module.RequestState, module.OutputProcessor
    if is_extended(processor.process_outputs, __name__):
        return
    require(not hasattr(state, "returned"), "RequestState has 'returned' of its own")
    require_parameters(processor.process_outputs, ("engine_core_outputs",))
    require_parameters(state._new_completion_output, ("token_ids", "finish_reason", "stop_reason"))
    state.returned = None
    processor.process_outputs = _receiving_embedding(processor.process_outputs)
    state._new_completion_output = _referring_to_embedding(state._new_completion_output)


def _receiving_embedding(original: Callable[..., Any]) -> Callable[..., Any]:
    @extending(original, __name__)
    def process_outputs(
        self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        for output in engine_core_outputs:
            embedding = getattr(output, ATTRIBUTE, None)
            if embedding is not None and output.request_id in self.request_states:
                info = output.mm_embedding_info
                if info is not None and info.scales is not None:
                    info = msgspec.structs.replace(info, scales=_owned(info.scales))
                state = self.request_states[output.request_id]
                state.returned = ReturnedEmbedding(_owned(embedding), info)
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


def _referring_to_embedding(original: Callable[..., Any]) -> Callable[..., Any]:
    @extending(original, __name__)
    def _new_completion_output(
        self: Any, token_ids: list[int], finish_reason: Any, stop_reason: Any
    ) -> Any:
        completion = CompletionOutput(**vars(original(self, token_ids, finish_reason, stop_reason)))
        completion.returned = self.returned
        return completion

    return _new_completion_output

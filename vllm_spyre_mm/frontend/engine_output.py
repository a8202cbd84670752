# SPDX-License-Identifier: Apache-2.0
"""Carries the embedding from the engine's process to the front end.

Leans on: ``EngineCoreOutput`` and ``EngineCoreOutputs`` are msgspec structs that travel as arrays,
so that one more field at the end is ignored by a decoder that does not know it and defaults where
it is missing; the front end decodes with the name ``EngineCoreOutputs`` of
``vllm.v1.engine.core_client``; tensors travel as frames of their own.
"""

from types import ModuleType
from typing import Any

import msgspec
import torch
from vllm.v1.engine import EngineCoreOutput as VllmEngineCoreOutput
from vllm.v1.engine import EngineCoreOutputs as VllmEngineCoreOutputs

from vllm_spyre_mm.frontend.metrics import SpyreSchedulerStats
from vllm_spyre_mm.multimodal.embedding import MMEmbeddingInfo
from vllm_spyre_mm.upstream.contract import require, require_attributes
from vllm_spyre_mm.upstream.module_loading import when_loaded


class EngineCoreOutput(VllmEngineCoreOutput, array_like=True, omit_defaults=True, gc=False):
    """vLLM's output of one request in one step, with its vision features.

    Attributes:
        mm_embedding: merged vision features of the whole prompt, ``(num_features, hidden_size)``
            in the encoder's dtype unless the request chose otherwise, on the CPU, contiguous. Set
            on the first output of a request with images that wants it, else None.
        mm_embedding_info: which of its rows are which; set with it.
    """

    mm_embedding: torch.Tensor | None = None
    mm_embedding_info: MMEmbeddingInfo | None = None


class EngineCoreOutputs(VllmEngineCoreOutputs, array_like=True, omit_defaults=True, gc=False):
    """vLLM's outputs of one step, decoding each request's :class:`EngineCoreOutput`.

    Attributes:
        scheduler_stats: what the platform's scheduler makes of vLLM's.
    """

    outputs: list[EngineCoreOutput] = []  # type: ignore[assignment]  # noqa: RUF012 - msgspec copies it
    scheduler_stats: SpyreSchedulerStats | None = None


def attach_mm_embeddings(
    outputs: dict[int, Any],
    mm_embeddings: dict[str, torch.Tensor],
    mm_embedding_infos: dict[str, MMEmbeddingInfo],
) -> None:
    """Put each request's embedding on its output, in place.

    Args:
        outputs: vLLM's ``EngineCoreOutputs`` by client index.
        mm_embeddings: embeddings by request id. One whose request has no output in this step (it
            was aborted meanwhile) is dropped.
        mm_embedding_infos: by request id, one for each embedding.
    """
    for client_outputs in outputs.values() if mm_embeddings else ():
        for i, output in enumerate(client_outputs.outputs):
            embedding = mm_embeddings.get(output.request_id)
            if embedding is not None:
                fields = {name: getattr(output, name) for name in output.__struct_fields__}
                client_outputs.outputs[i] = EngineCoreOutput(
                    **fields,
                    mm_embedding=embedding,
                    mm_embedding_info=mm_embedding_infos[output.request_id],
                )


def give_reason(outputs: dict[int, Any], req_id: str, reason: str) -> None:
    """Say on the last output of a failed request why it failed, in place.

    Args:
        outputs: vLLM's ``EngineCoreOutputs`` by client index; a request that was aborted meanwhile
            has none.
        req_id: of the request.
        reason: becomes its ``stop_reason``, which travels to ``CompletionOutput.stop_reason``.
    """
    for client_outputs in outputs.values():
        for output in client_outputs.outputs:
            if output.request_id == req_id:
                output.stop_reason = reason


def install() -> None:
    """Let the front end decode the embedding."""
    own, theirs = EngineCoreOutput.__struct_fields__, VllmEngineCoreOutput.__struct_fields__
    require(
        own == (*theirs, "mm_embedding", "mm_embedding_info"),
        "EngineCoreOutput cannot be extended at its end",
    )
    require(
        EngineCoreOutputs.__struct_fields__ == VllmEngineCoreOutputs.__struct_fields__,
        "EngineCoreOutputs cannot be redefined field by field",
    )
    require(
        all(msgspec.structs.fields(cls) for cls in (EngineCoreOutput, EngineCoreOutputs)),
        "EngineCoreOutput is not a msgspec struct",
    )
    when_loaded("vllm.v1.engine.core_client", _decode_with_embedding)


def _decode_with_embedding(module: ModuleType) -> None:
    require_attributes(module, ("EngineCoreOutputs",))
    require(
        module.EngineCoreOutputs in (VllmEngineCoreOutputs, EngineCoreOutputs),
        f"{module.__name__}.EngineCoreOutputs is another class",
    )
    module.EngineCoreOutputs = EngineCoreOutputs  # type: ignore[attr-defined]

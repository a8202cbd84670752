# SPDX-License-Identifier: Apache-2.0
"""Fields beside vLLM's own that travel from the worker through the scheduler to the front end."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput as VllmEngineCoreOutput
from vllm.v1.engine import EngineCoreOutputs as VllmEngineCoreOutputs
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput

from vllm_spyre_mm.multimodal.embedding import MMEmbeddingInfo

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


@dataclass(frozen=True, slots=True)
class FailedEncoding:
    """A request that fails because its images cannot be encoded or its embedding not be converted,
    and the caches' entries that the scheduler has to remove.

    Attributes:
        req_id: id of the request.
        reason: a sentence for the client.
        identifiers: images that the scheduler asked for and that are in no cache.
        block_ids: KV cache blocks that the step was to fill and did not.
    """

    req_id: str
    reason: str
    identifiers: list[str]
    block_ids: list[int]


@dataclass
class SpyreSchedulerOutput(SchedulerOutput):
    """vLLM's message about a step, with the images that are encoded beside it.

    Attributes:
        cancelled_images: identifiers of images that were asked for and that nobody wants any more.
        images_to_encode: those that are asked for from this step on, in order.
        may_encode: whether encoding may take time in this step.
    """

    cancelled_images: list[str] = field(default_factory=list)
    images_to_encode: "list[MultiModalFeatureSpec]" = field(default_factory=list)
    may_encode: bool = False


@dataclass(frozen=True, slots=True)
class EncodingDone:
    """An image that was encoded beside the steps is in the worker's cache, or never will be.

    Attributes:
        identifier: of the image.
        fault: the end of a sentence about an image that could not be encoded; None for features.
    """

    identifier: str
    fault: str | None


@dataclass
class SpyreModelRunnerOutput(ModelRunnerOutput):
    """vLLM's output of a step, with the embeddings that became complete in it.

    Attributes:
        mm_embeddings: by request id, ``(num_features, hidden_size)`` on the CPU.
        mm_embedding_infos: by request id, the image that each row belongs to.
        failed_encoding: set if the step's request fails; nothing was computed then.
        encodings_done: images that were encoded beside the steps and are done since the last one.
        num_encoded_anew: images that an EC connector had, did not bring, and were encoded.
    """

    mm_embeddings: dict[str, torch.Tensor] = field(default_factory=dict)
    mm_embedding_infos: dict[str, MMEmbeddingInfo] = field(default_factory=dict)
    failed_encoding: FailedEncoding | None = None
    encodings_done: list[EncodingDone] = field(default_factory=list)
    num_encoded_anew: int = 0

    @classmethod
    def of(cls, output: ModelRunnerOutput) -> Self:
        """An output as one of this class: itself, or a copy."""
        return output if isinstance(output, cls) else cls(**vars(output))

    @classmethod
    def of_failure(cls, failed: FailedEncoding) -> "SpyreModelRunnerOutput":
        """The output of a step whose one request fails."""
        return cls(
            req_ids=[failed.req_id],
            req_id_to_index={failed.req_id: 0},
            sampled_token_ids=[[]],
            failed_encoding=failed,
        )


@dataclass
class SpyreSchedulerStats(SchedulerStats):
    """vLLM's statistics of a step, with those of images and embeddings.

    Attributes:
        mm_embedding_held_bytes: embeddings of unfinished requests, at the step's end.
        encoder_runs: images encoded since the last statistics.
        encoder_cache_hits: images found in the encoder cache since the last statistics.
        mm_embeddings_returned: embeddings returned since the last statistics.
    """

    mm_embedding_held_bytes: int = 0
    encoder_runs: int = 0
    encoder_cache_hits: int = 0
    mm_embeddings_returned: int = 0


class EngineCoreOutput(VllmEngineCoreOutput, array_like=True, omit_defaults=True, gc=False):
    """vLLM's output of one request in one step, with its vision features.

    Attributes:
        mm_embedding: merged vision features of the whole prompt, ``(num_features, hidden_size)``
            in the encoder's dtype unless the request chose otherwise, on the CPU, contiguous. Set
            on the first output of a request with images that wants it, else None.
        mm_embedding_info: the image that each of its rows belongs to; set with it.
    """

    mm_embedding: torch.Tensor | None = None
    mm_embedding_info: MMEmbeddingInfo | None = None


class EngineCoreOutputs(VllmEngineCoreOutputs, array_like=True, omit_defaults=True, gc=False):
    """vLLM's outputs of one step, decoding each request's :class:`EngineCoreOutput`.

    Attributes:
        scheduler_stats: vLLM's, extended by the platform's scheduler.
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


def give_reasons(outputs: dict[int, Any], reasons: dict[str, str]) -> None:
    """Put the reasons on the last outputs of failed requests, in place.

    vLLM ends the requests of an engine without a decoder as complete once their prompts have gone
    by, whatever became of their images: they are errors too, and name nothing that is ready.

    Args:
        outputs: vLLM's ``EngineCoreOutputs`` by client index; a request that was aborted meanwhile
            has none.
        reasons: by request id; each becomes the ``stop_reason`` of its request, which travels to
            ``CompletionOutput.stop_reason``.
    """
    for client_outputs in outputs.values() if reasons else ():
        for output in client_outputs.outputs:
            if output.request_id in reasons:
                output.stop_reason = reasons[output.request_id]
                output.finish_reason = FinishReason.ERROR
                output.ec_transfer_params = None

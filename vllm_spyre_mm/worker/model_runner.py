# SPDX-License-Identifier: Apache-2.0
"""The model runner, which executes the scheduler's steps; each concern has a module of its own."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, ModelRunnerOutput
from vllm.v1.structured_output.utils import apply_grammar_bitmask

from vllm_spyre_mm.config import SpyreSettings, decoder_dtype_of
from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.model_executor.model import SpyreModel
from vllm_spyre_mm.multimodal.embedding import assemble
from vllm_spyre_mm.multimodal.encoder_cache import EncoderCache
from vllm_spyre_mm.multimodal.merge import mask_feature_tokens, plan_merge
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils
from vllm_spyre_mm.multimodal.pooling import EmbeddingFault
from vllm_spyre_mm.scheduler.geometry import Geometry
from vllm_spyre_mm.scheduler.outputs import FailedEncoding, SpyreModelRunnerOutput
from vllm_spyre_mm.worker.batch import PendingSample, SamplingBatch
from vllm_spyre_mm.worker.ec_transfer import FeatureTransfer
from vllm_spyre_mm.worker.encoding import ImageEncoder, ImageEncodingError
from vllm_spyre_mm.worker.prefill import prefill_chunk
from vllm_spyre_mm.worker.ranks import Ranks
from vllm_spyre_mm.worker.requests import (
    RequestTable,
    WorkerRequest,
)
from vllm_spyre_mm.worker.sampler import HostSampler

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec

logger = get_logger(__name__)


class SpyreModelRunner:
    """Runs prefill chunks and decodes of one model.

    Args:
        vllm_config: of the engine.
        model: placed, with its KV cache.
        geometry: block and chunk sizes, the scheduler's too.
        return_mm_embedding: collect the embeddings that requests ask for; only on rank 0.
        ranks: of the model; the first encodes and samples for all.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        model: SpyreModel[MMUtils],
        geometry: Geometry,
        return_mm_embedding: bool,
        ranks: Ranks,
    ) -> None:
        self.spyre_model = model
        self.ranks = ranks
        self.geometry = geometry
        self.return_mm_embedding = return_mm_embedding
        settings = SpyreSettings.from_vllm_config(vllm_config)
        self.requests = RequestTable(settings, model.mapping.positions)
        encoder_dtype: torch.dtype = getattr(torch, settings.encoder_dtype)
        self.encoder = ImageEncoder(model, ranks, encoder_dtype, decoder_dtype_of(vllm_config))
        self.encoder_cache = EncoderCache()
        self.transfer = FeatureTransfer(
            self.encoder_cache,
            self.encoder,
            ranks,
            config=vllm_config.ec_transfer_config,
            merges=model.part.has_decoder,
        )
        self.decodes = SamplingBatch(vllm_config, vllm_config.scheduler_config.max_num_seqs)
        self.prefilled = SamplingBatch(vllm_config, 1)
        self.sampler = HostSampler(
            logprobs_mode=vllm_config.model_config.logprobs_mode,
            use_fp64_gumbel=vllm_config.model_config.use_fp64_gumbel,
        )
        self.vocab_size = vllm_config.model_config.get_vocab_size()
        self.inputs = model.backend.inputs
        self._pending: PendingSample | None = None

    @property
    def model(self) -> nn.Module:
        """The FMS model; vLLM looks for it when an engine in the caller's process is dropped."""
        return self.spyre_model.fms_model

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Run one step up to its logits.

        Returns:
            The step's output if it samples no token (nothing scheduled, or a chunk that is not a
            prompt's last), else None: then :meth:`sample_tokens` returns it.

        Raises:
            ImageEncodingError: :meth:`failed_encoding` makes the step's output.
        """
        with self.spyre_model.backend.without_gradients():
            output = self._execute(scheduler_output)
        return None if output is None else self.transfer.attach(output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        """Sample from the logits of the last :meth:`execute_model`."""
        pending, self._pending = self._pending, None
        assert pending is not None, "execute_model comes first"
        with self.spyre_model.backend.without_gradients():
            return self.transfer.attach(self._sample_step(pending, grammar_output))

    def encode(self, images: "Mapping[int, MultiModalFeatureSpec]") -> list[torch.Tensor]:
        """Features of the images of one request; see :meth:`ImageEncoder.encode`."""
        with self.spyre_model.backend.without_gradients():
            return self.encoder.encode(images)

    def reset_encoder_cache(self) -> None:
        """Drop all encoded images (vLLM calls this when it resets its encoder cache manager)."""
        self.encoder_cache.clear()

    # -- steps --------------------------------------------------------------------------------

    def _execute(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        self._update_requests(scheduler_output)
        with self.transfer.step(scheduler_output):
            self._encode(self.transfer.to_encode(scheduler_output, self.requests))
        if not scheduler_output.num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        return self._compute(scheduler_output)

    def _compute(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Run a step whose features are in the cache."""
        scheduled = scheduler_output.num_scheduled_tokens
        requests = [self.requests[req_id] for req_id in scheduled]
        if all(request.prefilled for request in requests):
            self.decodes.set_members(requests)
            logits = self._decode()
            self._pending = PendingSample(scheduler_output, self.decodes, logits)
            return None
        (request,) = requests  # the scheduler gives a prefill a step of its own
        logits = self._prefill(request, scheduled[request.req_id])
        if not request.prefilled:
            return ModelRunnerOutput(
                req_ids=[request.req_id],
                req_id_to_index={request.req_id: 0},
                sampled_token_ids=[[]],
            )
        self.prefilled.set_members([request])
        self._pending = PendingSample(scheduler_output, self.prefilled, logits)
        return None

    def _sample_step(
        self, pending: PendingSample, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput:
        inputs = pending.batch.inputs
        sampled, logprobs = self.ranks.broadcast_tokens(
            len(pending.batch), lambda: self._sample(pending, grammar_output)
        )
        token_ids = sampled.tolist()
        for request, new in zip(pending.batch.members, token_ids, strict=True):
            request.output_token_ids += new
        output = ModelRunnerOutput(
            req_ids=list(inputs.req_ids),
            req_id_to_index=dict(inputs.req_id_to_index),
            sampled_token_ids=token_ids,
            logprobs=logprobs,  # vLLM takes the first rank's output
        )
        if pending.batch is self.decodes:
            return output
        (request,) = self.prefilled.members
        self.prefilled.discard([request.req_id])  # it decodes from the next step on
        return self.end_prefill(request, output)

    def _sample(
        self, pending: PendingSample, grammar_output: GrammarOutput | None
    ) -> tuple[torch.Tensor, LogprobsLists | None]:
        """Token ids, int64 ``(len(batch), 1)``, and log probabilities where they are asked for."""
        inputs = pending.batch.inputs
        # The sampler works in fp32 and in place; some logits processors of vLLM need fp32 before.
        logits = pending.logits.float()
        if grammar_output is not None:
            apply_grammar_bitmask(pending.scheduler_output, grammar_output, inputs, logits)
        sampled = self.sampler(logits=logits, sampling_metadata=inputs.sampling_metadata)
        logprobs = sampled.logprobs_tensors
        return sampled.sampled_token_ids.long(), logprobs.tolists() if logprobs else None

    def end_prefill(
        self, request: WorkerRequest, output: ModelRunnerOutput
    ) -> SpyreModelRunnerOutput:
        """The output of a prompt's last chunk, with its embedding or the reason of its failure."""
        if request.embedding_fault is not None:
            failed = FailedEncoding(request.req_id, request.embedding_fault, [], [])
            return SpyreModelRunnerOutput.of_failure(failed)  # its images and blocks are valid
        embeddings, infos = request.take_embedding()
        return SpyreModelRunnerOutput(
            **vars(output), mm_embeddings=embeddings, mm_embedding_infos=infos
        )

    def _update_requests(self, scheduler_output: SchedulerOutput) -> None:
        self.decodes.discard(scheduler_output.finished_req_ids)
        # Preempted, and still a member if nothing was decoded since: its row is out of date.
        self.decodes.discard(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        self.requests.remove(scheduler_output.finished_req_ids)
        self.encoder_cache.evict(scheduler_output.free_encoder_mm_hashes)
        self.requests.add(scheduler_output.scheduled_new_reqs)
        self.requests.update(scheduler_output.scheduled_cached_reqs)

    def _encode(self, scheduled: Mapping[str, list[int]]) -> None:
        """Encode the images that are to be encoded, all of a request together.

        Raises:
            ImageEncodingError: none of the request's images entered the cache.
        """
        for req_id, items in scheduled.items():
            images = {item: self.requests[req_id].mm_features[item] for item in items}
            for feature, features in zip(images.values(), self.encode(images), strict=True):
                self.encoder_cache.put(feature, features)

    def failed_encoding(
        self, scheduler_output: SchedulerOutput, error: ImageEncodingError
    ) -> ModelRunnerOutput:
        """The output of a step whose images could not be encoded; its one request fails."""
        ((req_id, num_new),) = scheduler_output.num_scheduled_tokens.items()
        request = self.requests[req_id]
        items = scheduler_output.scheduled_encoder_inputs.get(req_id, [])
        lacking = self.transfer.lacking(request, num_new, items)
        unfilled = request.num_computed_tokens // self.geometry.block_size
        failed = SpyreModelRunnerOutput.of_failure(
            FailedEncoding(
                req_id=req_id,
                reason=str(error),
                identifiers=[request.mm_features[item].identifier for item in items + lacking],
                block_ids=request.blocks[unfilled:],
            )
        )
        return self.transfer.attach(failed)

    def _prefill(self, request: WorkerRequest, num_new: int) -> torch.Tensor:
        """Run one chunk; returns the logits of its last token, ``(1, vocab_size)``."""
        start, num_tokens = request.num_computed_tokens, request.num_tokens
        end = start + num_new
        slices, feature_index = plan_merge(request.mm_features, start, end)
        chunk = prefill_chunk(
            token_ids=request.token_ids(start, end),
            start=start,
            num_tokens=num_tokens,
            blocks=request.blocks,
            feature_index=feature_index,
            positions=request.positions(start, end),
            geometry=self.geometry,
            padded=self.inputs.padded,
        )
        embeds = self.spyre_model.embed(mask_feature_tokens(chunk.token_ids, chunk.feature_index))
        levels: tuple[torch.Tensor, ...] = ()
        if slices:
            rows = torch.cat(self.encoder_cache.gather(request.mm_features, slices))
            embeds = self.spyre_model.mapping.merge(embeds, rows, chunk.feature_index)
            levels = self.spyre_model.mapping.merge_levels(embeds, rows, chunk.feature_index)
        self.collect(request, end)
        request.prefilled = end == num_tokens
        if request.choice is not None and not request.choice.generate:
            return embeds.new_zeros(1, self.vocab_size)  # nobody reads its token or its blocks
        logits = self.spyre_model.forward(self.inputs.chunk_inputs(chunk, embeds, levels))
        return self.inputs.chunk_logits(logits, chunk)

    def collect(self, request: WorkerRequest, end: int) -> None:
        """Collect for the embedding the items with features before ``end``, in prompt order.

        At the request's admission the scheduler has every item from the prompt's start on encoded,
        also those that a prefix-cache hit covers.
        """
        for feature in request.uncollected(end):
            request.mm_parts.append(self.encoder_cache.get(feature))
        if end < request.num_tokens or request.choice is None:
            return
        if request.mm_parts and self.return_mm_embedding:
            wanted = [each for each in request.mm_features if request.choice.wants(each.modality)]
            mapping = self.spyre_model.mapping
            layouts = [mapping.feature_layout(feature.data or {}) for feature in wanted]
            try:
                request.mm_embedding, request.mm_embedding_info = assemble(
                    request.mm_parts,
                    wanted,
                    layouts,
                    request.choice,
                    mapping.text_config.hidden_size,
                )
            except EmbeddingFault as error:  # the other ranks collect nothing: go on
                request.embedding_fault = str(error)
        request.mm_parts.clear()

    def _decode(self) -> torch.Tensor:
        """Run the decode batch; returns logits ``(batch, vocab_size)``."""
        inputs = self.inputs.decode_inputs(self.decodes.decode_rows(), self.spyre_model.embed)
        return self.inputs.decode_logits(self.spyre_model.forward(inputs), len(self.decodes))

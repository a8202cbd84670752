# SPDX-License-Identifier: Apache-2.0
"""The request that the worker keeps of each request."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.multimodal.embedding import MMEmbeddingInfo
from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice, choice_of
from vllm_spyre_mm.multimodal.merge import first_feature, plan_merge

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

FindPositions = Callable[
    [list[int], "Sequence[MultiModalFeatureSpec]"], tuple[torch.Tensor, int] | None
]
"""Positions of a prompt on three axes; see ``MMUtils.positions``."""


@dataclass
class WorkerRequest(CachedRequestState):
    """A request as the worker knows it: vLLM's cached request, its prefill and its embedding.

    vLLM's ``mrope_positions`` and ``mrope_position_delta`` are set when the request is added, if
    its prompt has positions on three axes: int64 ``(3, num_prompt_tokens)``, and what is added to a
    later token's index, on every axis.

    Attributes:
        prefilled: whether the whole prompt is in the KV cache; set by the runner after the last
            chunk, unset when the request resumes after a preemption.
        mm_parts: features of the images collected so far, whole images in prompt order,
            ``(num_features, hidden_size)`` each; references into the encoder cache. Set by the
            runner at each chunk; empty when no embedding is wanted.
        choice: which embedding it gets back; None for none. Set when the request is added.
        mm_embedding: the collected features as one tensor, ``(num_features, hidden_size)`` in the
            encoder's dtype unless ``choice`` says otherwise, contiguous, on the CPU. Set at the
            last chunk, handed over with the first token, then None again.
        mm_embedding_info: the image that each of its rows belongs to; set and handed over with it.
        embedding_fault: why the embedding cannot be returned, a sentence for the client; set at the
            last chunk, and the request fails with it.
    """

    prefilled: bool = False
    mm_parts: list[torch.Tensor] = field(default_factory=list)
    choice: EmbeddingChoice | None = None
    mm_embedding: torch.Tensor | None = None
    mm_embedding_info: MMEmbeddingInfo | None = None
    embedding_fault: str | None = None

    @classmethod
    def from_new(cls, data: NewRequestData, settings: SpyreSettings) -> "WorkerRequest":
        """Make a request from the scheduler's first message about it.

        Args:
            data: the message.
            settings: of the engine; they give the defaults of a request's choice.
        """
        params = data.sampling_params
        generator = None
        if params is not None and params.sampling_type == SamplingType.RANDOM_SEED:
            assert params.seed is not None, "SamplingType.RANDOM_SEED means that there is one"
            generator = torch.Generator().manual_seed(params.seed)
        return cls(
            req_id=data.req_id,
            prompt_token_ids=data.prompt_token_ids,
            mm_features=data.mm_features,
            sampling_params=params,
            generator=generator,
            block_ids=data.block_ids,
            num_computed_tokens=data.num_computed_tokens,
            output_token_ids=[],
            choice=choice_of(params, settings),
        )

    def take_embedding(self) -> tuple[dict[str, torch.Tensor], dict[str, MMEmbeddingInfo]]:
        """Hand the embedding over, by request id, if there is one; the request drops it."""
        embedding, info = self.mm_embedding, self.mm_embedding_info
        self.mm_embedding = self.mm_embedding_info = None
        if embedding is None or info is None:
            return {}, {}
        return {self.req_id: embedding}, {self.req_id: info}

    def uncollected(self, end: int) -> "list[MultiModalFeatureSpec]":
        """Items with features before ``end`` that the embedding still lacks, in prompt order.

        There are none once the first token is there, with which the embedding was returned.
        """
        if self.choice is None or self.output_token_ids:
            return []
        wanted = [each for each in self.mm_features if self.choice.wants(each.modality)]
        lacking = wanted[len(self.mm_parts) :]
        return [each for each in lacking if first_feature(each.mm_position) < end]

    def items_read(self, num_new: int, *, merges: bool) -> list[int]:
        """Indices of the items whose features a chunk of the prompt reads.

        Args:
            num_new: tokens of the chunk.
            merges: whether the chunk's embeddings are made, beside the request's embedding.
        """
        start, end = self.num_computed_tokens, self.num_computed_tokens + num_new
        collected = {id(each) for each in self.uncollected(end)}
        merged = {each.item for each in plan_merge(self.mm_features, start, end)[0] if merges}
        return [
            item
            for item, each in enumerate(self.mm_features)
            if item in merged or id(each) in collected
        ]

    @property
    def blocks(self) -> list[int]:
        """Block ids of the one KV cache group, in prompt order; none where there is no cache."""
        return self.block_ids[0] if self.block_ids else []

    def token_ids(self, start: int, end: int) -> list[int]:
        """Token ids of the positions ``[start, end)``, generated ones included."""
        assert self.prompt_token_ids is not None, "prompts given as embeddings are refused"
        num_prompt = self.num_prompt_tokens
        return [
            *self.prompt_token_ids[start:end],
            *self.output_token_ids[max(0, start - num_prompt) : max(0, end - num_prompt)],
        ]

    def positions(self, start: int, end: int) -> np.ndarray | None:
        """Positions of the tokens ``[start, end)``, generated ones included.

        Returns:
            int64 ``(3, end - start)``; None if they are the tokens' indices.
        """
        if self.mrope_positions is None or self.mrope_position_delta is None:
            return None
        prompt = self.mrope_positions[:, start:end].numpy()
        later = np.arange(max(start, self.num_prompt_tokens), end) + self.mrope_position_delta
        return np.concatenate([prompt, np.broadcast_to(later, (len(prompt), len(later)))], axis=1)

    @property
    def next_position(self) -> int:
        """Position of the token that a decode is given, on every axis."""
        return self.num_computed_tokens + (self.mrope_position_delta or 0)


class RequestTable:
    """The requests that the worker knows, kept up to date from the scheduler's messages.

    Args:
        settings: of the engine.
        find_positions: of the model's mapping.
    """

    def __init__(self, settings: SpyreSettings, find_positions: FindPositions) -> None:
        self._settings = settings
        self._find_positions = find_positions
        self._requests: dict[str, WorkerRequest] = {}

    def __getitem__(self, req_id: str) -> WorkerRequest:
        return self._requests[req_id]

    def __len__(self) -> int:
        return len(self._requests)

    def remove(self, req_ids: Iterable[str]) -> None:
        """Drop finished requests and everything they hold."""
        for req_id in req_ids:
            self._requests.pop(req_id, None)

    def add(self, new: Iterable[NewRequestData]) -> None:
        """Add requests that are scheduled for the first time."""
        for data in new:
            request = WorkerRequest.from_new(data, self._settings)
            if data.mm_features and data.prompt_token_ids is not None:
                found = self._find_positions(data.prompt_token_ids, data.mm_features)
                if found is not None:
                    request.mrope_positions, request.mrope_position_delta = found
            self._requests[data.req_id] = request

    def update(self, cached: CachedRequestData) -> None:
        """Update blocks and progress of requests that are scheduled again."""
        for i, req_id in enumerate(cached.req_ids):
            request = self._requests[req_id]
            request.num_computed_tokens = cached.num_computed_tokens[i]
            new_blocks = cached.new_block_ids[i]
            if req_id in cached.resumed_req_ids:
                assert new_blocks is not None, "a resumed request is allocated anew"
                request.block_ids = new_blocks
                request.prefilled = False
                request.mm_parts.clear()
            elif new_blocks is not None:
                for blocks, more in zip(request.block_ids, new_blocks, strict=True):
                    blocks.extend(more)

# SPDX-License-Identifier: Apache-2.0
"""What the worker remembers of each request."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.multimodal.embedding import EmbeddingChoice, MMEmbeddingInfo, choice_of


@dataclass
class RequestState(CachedRequestState):
    """vLLM's cached request, with where its prefill is and what it collected.

    Attributes:
        prefilled: the whole prompt is in the KV cache; set by the runner after the last chunk,
            unset when the request resumes after a preemption.
        mm_parts: features of the images collected so far, whole images in prompt order,
            ``(num_features, hidden_size)`` each; references into the encoder cache. Set by the
            runner at each chunk; empty when no embedding is wanted.
        choice: what it wants of its embedding; None for nothing. Set when it is added.
        mm_embedding: the collected features as one tensor, ``(num_features, hidden_size)`` in the
            encoder's dtype unless ``choice`` says otherwise, contiguous, on the CPU. Set at the
            last chunk, handed over with the first token, then None again.
        mm_embedding_info: which of its rows are which; set and handed over with it.
        embedding_fault: why there is none although it is wanted, a sentence for the client; set
            at the last chunk, and the request fails with it.
    """

    prefilled: bool = False
    mm_parts: list[torch.Tensor] = field(default_factory=list)
    choice: EmbeddingChoice | None = None
    mm_embedding: torch.Tensor | None = None
    mm_embedding_info: MMEmbeddingInfo | None = None
    embedding_fault: str | None = None

    @classmethod
    def from_new(cls, data: NewRequestData, settings: SpyreSettings) -> "RequestState":
        """The state of a request that the scheduler sends for the first time.

        Args:
            data: what the scheduler sends.
            settings: of the engine, for what a request does not choose.
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

    @property
    def blocks(self) -> list[int]:
        """Block ids of the one KV cache group, in prompt order."""
        return self.block_ids[0]

    def token_ids(self, start: int, end: int) -> list[int]:
        """Token ids of the positions ``[start, end)``, generated ones included."""
        assert self.prompt_token_ids is not None, "prompts given as embeddings are refused"
        num_prompt = self.num_prompt_tokens
        return [
            *self.prompt_token_ids[start:end],
            *self.output_token_ids[max(0, start - num_prompt) : max(0, end - num_prompt)],
        ]


class RequestTable:
    """The requests that the worker knows, kept up to date from the scheduler's messages.

    Args:
        settings: of the engine.
    """

    def __init__(self, settings: SpyreSettings) -> None:
        self._settings = settings
        self._states: dict[str, RequestState] = {}

    def __getitem__(self, req_id: str) -> RequestState:
        return self._states[req_id]

    def __len__(self) -> int:
        return len(self._states)

    def remove(self, req_ids: Iterable[str]) -> None:
        """Forget finished requests and everything they hold."""
        for req_id in req_ids:
            self._states.pop(req_id, None)

    def add(self, new: Iterable[NewRequestData]) -> None:
        """Remember requests that are scheduled for the first time."""
        for data in new:
            self._states[data.req_id] = RequestState.from_new(data, self._settings)

    def update(self, cached: CachedRequestData) -> None:
        """Take over blocks and progress of requests that are scheduled again."""
        for i, req_id in enumerate(cached.req_ids):
            state = self._states[req_id]
            state.num_computed_tokens = cached.num_computed_tokens[i]
            new_blocks = cached.new_block_ids[i]
            if req_id in cached.resumed_req_ids:
                assert new_blocks is not None, "a resumed request is allocated anew"
                state.block_ids = new_blocks
                state.prefilled = False
                state.mm_parts.clear()
            elif new_blocks is not None:
                for blocks, more in zip(state.block_ids, new_blocks, strict=True):
                    blocks.extend(more)

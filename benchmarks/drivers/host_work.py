# SPDX-License-Identifier: Apache-2.0
"""What vLLM itself does around a model in a step: its scheduler and its sampler, alone."""

import time
from typing import Any

import torch

PARTS = ("schedule", "sampler", "bookkeeping")
"""Of a step, in order: ``schedule``, the sampler, ``update_from_output``."""

EVICTED = 1 << 26
"""Bytes that are read in place of the model, between schedule and sampler: caches are as cold."""


class Reference:
    """vLLM's own scheduler with as many decoding requests as the engine has, and its sampler.

    Args:
        core: engine core whose configuration it takes.
        batch: requests.
        context: tokens of each prompt.
        steps: that :meth:`step` is called at most, besides those of the prompts' ends.
    """

    def __init__(self, core: Any, batch: int, context: int, steps: int) -> None:
        from vllm import SamplingParams
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.request import Request
        from vllm.v1.sample.sampler import Sampler

        self._scheduler = Scheduler(
            vllm_config=core.vllm_config,
            kv_cache_config=core.scheduler.kv_cache_config,
            structured_output_manager=core.structured_output_manager,
            block_size=core.scheduler.block_size,
        )
        self._sampler = Sampler()
        for i in range(batch):
            params = SamplingParams(temperature=0.0, max_tokens=steps + 8 * batch + 64)
            params.ignore_eos = True
            request = Request(f"reference-{i}", [7] * context, params, None)
            self._scheduler.add_request(request)
        self._requests = self._scheduler.requests
        vocab_size = core.vllm_config.model_config.get_vocab_size()
        self._logits = torch.randn(batch, vocab_size)
        self._metadata = _greedy(batch, vocab_size)
        self._memory = torch.ones(EVICTED // 4)
        while any(request.num_output_tokens == 0 for request in self._requests.values()):
            scheduled = self._scheduler.schedule()
            self._update(scheduled, [7] * batch)

    def step(self) -> dict[str, float]:
        """Schedule a decode of all, sample, and enter the tokens; returns seconds of each part."""
        started = time.perf_counter()
        scheduled = self._scheduler.schedule()
        taken = {"schedule": time.perf_counter() - started}
        assert len(scheduled.num_scheduled_tokens) == len(self._logits), "all decode"
        self._memory.sum()
        started = time.perf_counter()
        sampled = self._sampler(logits=self._logits, sampling_metadata=self._metadata)
        taken["sampler"] = time.perf_counter() - started
        tokens = sampled.sampled_token_ids.flatten().tolist()
        taken["bookkeeping"] = self._update(scheduled, tokens)
        return taken | {"total": sum(taken.values())}

    def _update(self, scheduled: Any, tokens: list[int]) -> float:
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(scheduled.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: row for row, name in enumerate(names)},
            sampled_token_ids=[
                [] if self._requests[name].is_prefill_chunk else [token]
                for name, token in zip(names, tokens, strict=False)
            ],
        )
        started = time.perf_counter()
        self._scheduler.update_from_output(scheduled, output)
        return time.perf_counter() - started


def _greedy(batch: int, vocab_size: int) -> Any:
    """What vLLM's sampler is told of greedy requests without penalties."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    none = torch.zeros(batch)
    return SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none,
        output_token_ids=[[] for _ in range(batch)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )

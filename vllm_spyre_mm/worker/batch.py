# SPDX-License-Identifier: Apache-2.0
"""The requests that are sampled together: vLLM's input batch, and what it keeps of the tokens."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.worker.block_table import SlotMappingMode
from vllm.v1.worker.gpu_input_batch import InputBatch

from vllm_spyre_mm.model_executor.step_inputs import DecodeRows
from vllm_spyre_mm.worker.requests import RequestState

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class SamplingBatch:
    """vLLM's ``InputBatch`` for a fixed number of rows.

    The runner has two: the requests that decode together, and the one whose prefill ends. vLLM's
    own runner moves a request that it resumes between batches in the same way.

    Args:
        vllm_config: of the engine.
        num_rows: requests it can hold.
    """

    def __init__(self, vllm_config: "VllmConfig", num_rows: int) -> None:
        model_config = vllm_config.model_config
        device = torch.device("cpu")
        block_size = vllm_config.cache_config.block_size
        custom = model_config.logits_processors or ()
        self.inputs = InputBatch(
            max_num_reqs=num_rows,
            max_model_len=model_config.max_model_len,
            max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            device=device,
            vocab_size=model_config.get_vocab_size(),
            block_sizes=[block_size],
            max_num_blocks_per_req=[-(-model_config.max_model_len // block_size)],
            logitsprocs=build_logitsprocs(vllm_config, device, False, False, custom),
            logitsprocs_need_output_token_ids=bool(custom),
            reasoning_config=vllm_config.reasoning_config,
            # The rows' cache slots are computed in model_executor.card and .cpu.
            slot_mapping_modes=[SlotMappingMode.NONE],
        )

    def __len__(self) -> int:
        return self.inputs.num_reqs

    @property
    def req_ids(self) -> list[str]:
        """Request ids by row."""
        return self.inputs.req_ids

    def set_members(self, states: Iterable[RequestState]) -> None:
        """Make exactly these requests the members; the rows of those that stay are kept."""
        wanted = {state.req_id: state for state in states}
        if wanted.keys() != self.inputs.req_id_to_index.keys():
            for req_id in [req_id for req_id in self.req_ids if req_id not in wanted]:
                self.inputs.remove_request(req_id)
            for req_id, state in wanted.items():
                if req_id not in self.inputs.req_id_to_index:
                    self.inputs.add_request(state)
            self.inputs.condense()
        self._update_rows([wanted[req_id] for req_id in self.req_ids])
        # Also where nobody came or went: logits processors may count steps.
        self.inputs.refresh_metadata()

    def discard(self, req_ids: Iterable[str]) -> None:
        """Remove requests that ended."""
        removed = [self.inputs.remove_request(req_id) for req_id in req_ids]
        if any(row is not None for row in removed):
            self.inputs.condense()
            self.inputs.refresh_metadata()

    def _update_rows(self, states: list[RequestState]) -> None:
        """Take over the progress and the new blocks of the members, in row order."""
        table = self.inputs.block_table[0]
        known = table.num_blocks_per_row[: len(states)].tolist()
        for row, (state, num_blocks) in enumerate(zip(states, known, strict=True)):
            if num_blocks < len(state.block_ids[0]):
                table.append_row(state.block_ids[0][num_blocks:], row)
        progress = [state.num_computed_tokens for state in states]
        self.inputs.num_computed_tokens_cpu[: len(states)] = progress

    def decode_rows(self) -> DecodeRows:
        """What a decode of all members is made from.

        Their last tokens are read where they were sampled to: vLLM's table of all tokens, from
        which its sampler takes prompts, is not kept up to date.
        """
        sampled = cast("list[list[int]]", self.inputs.req_output_token_ids)
        return DecodeRows(
            token_ids=np.array([tokens[-1] for tokens in sampled], dtype=np.int32),
            num_computed=self.inputs.num_computed_tokens_cpu[: len(sampled)],
            block_rows=self.inputs.block_table[0].get_numpy_array(),
        )

# SPDX-License-Identifier: Apache-2.0
"""The requests that are sampled together, in vLLM's input batch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.worker.block_table import SlotMappingMode
from vllm.v1.worker.gpu_input_batch import InputBatch

from vllm_spyre_mm.model_executor.step_inputs import DecodeRows
from vllm_spyre_mm.worker.requests import WorkerRequest

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class PendingSample:
    """Logits that ``execute_model`` computed and ``sample_tokens`` will sample from.

    Attributes:
        scheduler_output: of the step.
        batch: the requests to sample for.
        logits: ``(len(batch), vocab_size)``.
    """

    scheduler_output: SchedulerOutput
    batch: "SamplingBatch"
    logits: torch.Tensor


class SamplingBatch:
    """vLLM's ``InputBatch`` for a fixed number of rows.

    The runner has two: the requests that decode together, and the one whose prefill ends. vLLM's
    own runner moves a request that it resumes between batches in the same way.

    Args:
        vllm_config: of the engine.
        num_rows: requests it can hold.

    Attributes:
        inputs: vLLM's ``InputBatch``. Its arrays of token ids and computed tokens are not kept up
            to date: the sampler reads only the prompts in them.
        members: the requests by row, as of the last :meth:`set_members`.
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
        self.members: list[WorkerRequest] = []
        self._num_blocks: list[int] = []  # blocks of each member that the block table has
        self._given: list[str] = []  # ids of the last set_members, in its order

    def __len__(self) -> int:
        return self.inputs.num_reqs

    @property
    def req_ids(self) -> list[str]:
        """Request ids by row."""
        return self.inputs.req_ids

    def set_members(self, requests: list[WorkerRequest]) -> None:
        """Make exactly these requests the members; the rows of those that stay are kept."""
        req_ids = [request.req_id for request in requests]
        if req_ids != self._given:
            self._replace_members(dict(zip(req_ids, requests, strict=True)))
            self._given = req_ids
        self._append_blocks()
        # Also where no member came or went: logits processors may count steps.
        self.inputs.refresh_metadata()

    def _replace_members(self, wanted: dict[str, WorkerRequest]) -> None:
        for req_id in [req_id for req_id in self.req_ids if req_id not in wanted]:
            self.inputs.remove_request(req_id)
        for req_id, request in wanted.items():
            if req_id not in self.inputs.req_id_to_index:
                self.inputs.add_request(request)
        self.inputs.condense()
        self.members = [wanted[req_id] for req_id in self.req_ids]
        self._num_blocks = self.inputs.block_table[0].num_blocks_per_row[: len(wanted)].tolist()

    def discard(self, req_ids: Iterable[str]) -> None:
        """Remove requests that ended or were preempted."""
        removed = [self.inputs.remove_request(req_id) for req_id in req_ids]
        if any(row is not None for row in removed):
            self._given = []
            self.inputs.condense()
            self.inputs.refresh_metadata()

    def _append_blocks(self) -> None:
        """Append the new blocks of the members to the block table."""
        for row, (request, num_known) in enumerate(
            zip(self.members, self._num_blocks, strict=True)
        ):
            blocks = request.blocks
            if num_known < len(blocks):
                self.inputs.block_table[0].append_row(blocks[num_known:], row)
                self._num_blocks[row] = len(blocks)

    def decode_rows(self) -> DecodeRows:
        """The rows of a decode of all members."""
        return DecodeRows(
            token_ids=[request.output_token_ids[-1] for request in self.members],
            num_computed=[request.num_computed_tokens for request in self.members],
            positions=[request.next_position for request in self.members],
            blocks=[request.blocks for request in self.members],
            block_rows=self.inputs.block_table[0].get_numpy_array(),
        )

# SPDX-License-Identifier: Apache-2.0
"""The sizes of an engine's steps, as a backend takes them."""

from typing import TYPE_CHECKING

from vllm_spyre_mm.model_executor.backend import StepSizes
from vllm_spyre_mm.scheduler.geometry import geometry_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def step_sizes(vllm_config: "VllmConfig") -> StepSizes:
    """The step sizes of a resolved configuration."""
    geometry, max_model_len = geometry_of(vllm_config), vllm_config.model_config.max_model_len
    return StepSizes(
        block_size=geometry.block_size,
        chunk_size=geometry.chunk_size,
        context_len=geometry.context_len(max_model_len),
        max_batch_tkv=geometry.max_batch_tkv,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_blocks=geometry.num_blocks(max_model_len),
    )

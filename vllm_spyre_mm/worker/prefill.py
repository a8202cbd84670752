# SPDX-License-Identifier: Apache-2.0
"""Lays out one chunk of one prefill."""

import numpy as np
import torch

from vllm_spyre_mm.model_executor.step_inputs import PrefillChunk
from vllm_spyre_mm.multimodal.merge import TEXT
from vllm_spyre_mm.scheduler.geometry import Geometry


def prefill_chunk(
    *,
    token_ids: list[int],
    start: int,
    num_tokens: int,
    blocks: list[int],
    feature_index: np.ndarray,
    positions: np.ndarray | None = None,
    geometry: Geometry,
    padded: bool,
) -> PrefillChunk:
    """Lay out the tokens ``[start, start + len(token_ids))`` of a prompt.

    Args:
        token_ids: of the chunk.
        start: position of its first token; 0 or where the grid of chunks has a boundary.
        num_tokens: length of the whole prompt.
        blocks: the request's blocks, enough for the chunk.
        feature_index: int64 ``(len(token_ids),)``, from ``plan_merge``.
        positions: int64 ``(3, len(token_ids))`` on three axes; None: the tokens' indices.
        geometry: block and chunk sizes.
        padded: include the padding, as the card's static graph requires. On a CPU the chunk is its
            real tokens alone.
    """
    left = geometry.left_padding(num_tokens) if padded else 0
    before, after = 0, 0
    if padded:
        padded_start = (start + left) // geometry.chunk_size * geometry.chunk_size
        before = start + left - padded_start
        after = geometry.chunk_size - before - len(token_ids)
    # Real tokens and the padding after them: consecutive positions of the request's own blocks.
    own = np.arange(start, start + len(token_ids) + after)
    block_ids = np.asarray(blocks[: geometry.num_blocks(len(own) + start)], dtype=np.int64)
    size = geometry.block_size
    slots = block_ids[own // size] * size + own % size
    if positions is None:
        positions = np.arange(start, start + len(token_ids))[None]
    left_blocks = left // size

    def padded_rows(values: np.ndarray, fill: int) -> torch.Tensor:
        rows = np.full((len(values), before + len(token_ids) + after), fill, dtype=np.int64)
        rows[:, before : before + values.shape[1]] = values
        return torch.from_numpy(rows)

    def padded_row(values: np.ndarray | list[int], fill: int) -> torch.Tensor:
        return padded_rows(np.asarray(values)[None], fill)

    slot_mapping = padded_row(slots, 0)
    if before:
        slot_mapping[0, :before] = torch.arange(before) % size  # block 0
    return PrefillChunk(
        token_ids=padded_row(token_ids, 0),
        position_ids=padded_rows(positions, 0),
        feature_index=padded_row(feature_index, TEXT),
        is_padding=padded_row(np.zeros(len(token_ids)), 1).bool(),
        slot_mapping=slot_mapping,
        block_table=torch.from_numpy(np.concatenate([np.zeros(left_blocks, np.int64), block_ids]))[
            None
        ],
        current_tkv=torch.tensor([left + start + len(token_ids) + after]),
        left_padding=torch.tensor([left]),
        last_row=-1 - after,
    )

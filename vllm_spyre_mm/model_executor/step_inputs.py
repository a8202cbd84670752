# SPDX-License-Identifier: Apache-2.0
"""Inputs of a step: what the worker gives a backend, and what the decoder is called with."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One chunk of a prompt, laid out for the decoder; the batch is one request.

    Attributes:
        token_ids: int64 ``(1, length)``, 0 on padding.
        position_ids: int64 ``(1, length)`` in real tokens, 0 on padding; ``(3, length)`` for a
            prompt with positions on three axes.
        feature_index: int64 ``(1, length)``; see ``multimodal.merge``.
        is_padding: bool ``(1, length)``.
        slot_mapping: int64 ``(1, length)``: the cache row of each token; padding before the
            prompt goes to block 0, padding after it to the rest of the last block.
        block_table: int64 ``(1, blocks)``, block 0 for the padding before the prompt.
        current_tkv: int64 ``(1,)``: end of the chunk in padded positions.
        left_padding: int64 ``(1,)``: padding before the prompt.
        last_row: row of the chunk's last real token, counted from the end (negative).
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    feature_index: torch.Tensor
    is_padding: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    current_tkv: torch.Tensor
    left_padding: torch.Tensor
    last_row: int


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The requests of a decode, a row for each.

    Attributes:
        token_ids: the last token of each request.
        num_computed: tokens of each that are in the KV cache.
        positions: of each token; on all axes, if there are three.
        blocks: the block ids of each, from the left.
        block_rows: the same as int32 ``(num_rows, blocks)``, vLLM's own array; rows beyond the
            batch hold stale values.
    """

    token_ids: list[int]
    num_computed: list[int]
    positions: list[int]
    blocks: list[list[int]]
    block_rows: np.ndarray


@dataclass(frozen=True, slots=True)
class DecoderInputs:
    """Inputs of one forward pass of the decoder; made by a backend.

    All tensors are on the host; *padded* as in :mod:`vllm_spyre_mm.scheduler.geometry`. On the CPU
    the batch is 1: the tokens of all sequences are in one row.

    Attributes:
        embeds: ``(batch, length, hidden_size)``, the decoder's dtype.
        position_ids: int64 ``(batch, length)``: positions in real tokens, 0 on padding; for a
            decoder with ``models.mrope.StepRope`` what that takes in their place.
        attention: keyword arguments of the attention op: ``slot_mapping`` int64
            ``(batch, length)``; for the card ``block_table`` int64 ``(batch, blocks)`` and
            ``current_tkv_mask`` and ``left_padded_prompt_mask`` int64 ``(batch,)``; for the CPU
            the result of ``cpu.attention.cpu_attention_kwargs``.
        last_n_tokens: how many positions from the end get logits; 0: all.
        deepstack: levels of the image features, each like ``embeds`` and zero on text and padding;
            empty where none are added.
    """

    embeds: torch.Tensor
    position_ids: torch.Tensor
    attention: Mapping[str, torch.Tensor]
    last_n_tokens: int
    deepstack: tuple[torch.Tensor, ...] = ()

# SPDX-License-Identifier: Apache-2.0
"""Bidirectional attention of a vision tower, as an FMS attention algorithm.

FMS's own, ``sdpa_bidirectional``, guesses the layout of keys by comparing their length with the
number of heads, and is wrong for an image that has as many patches as the tower has heads.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from fms.modules.attention import register_attention_op

from vllm_spyre_mm.model_executor.cpu.kernels import blocked_attention
from vllm_spyre_mm.model_executor.cpu.operators import define_operator, shape_of_first

BIDIRECTIONAL = "spyre_mm_bidirectional"
"""FMS's ``attn_name`` of the algorithm."""


def hidden_states(embeddings: torch.Tensor, layers: Any, **given: Any) -> Iterator[torch.Tensor]:
    """Yield the embeddings, then the output of each layer of one of FMS's encoders.

    The encoder itself would keep all of them in memory.

    Args:
        embeddings: what comes into the first layer.
        layers: of the encoder.
        given: what each layer takes beside the hidden states.
    """
    states = embeddings
    yield states
    for layer in layers:
        states = layer(hidden_states=states, attn_name=BIDIRECTIONAL, **given)
        yield states


def _compute(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    nheads: int,
    kvheads: int,
    p_dropout: float,
    scale_factor: float | None,
    **_: Any,
) -> torch.Tensor:
    """Every position attends to every other; all are ``(batch, positions, heads, head_dim)``."""
    assert nheads == kvheads, "a tower's heads share no keys"
    scale = scale_factor if scale_factor is not None else query.shape[-1] ** -0.5
    # In eager mode the C++ kernel must not be needed.
    if torch.compiler.is_compiling():
        return torch.ops.spyre_mm.bidirectional_attention(query, keys, values, scale)
    return _attend_with_sdpa(query, keys, values, scale)


def _attend_with_sdpa(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), scale=scale
    )
    return attended.transpose(1, 2).contiguous()


def bidirectional_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Implements the operator: the C++ kernel where it supports such heads, else PyTorch's SDPA."""
    if blocked_attention.supports(query.shape[-1], query.dtype):
        return blocked_attention.attend_bidirectionally(query, keys, values, scale)
    return _attend_with_sdpa(query, keys, values, scale)


def _store(*_: Any, **__: Any) -> Any:
    raise NotImplementedError  # a vision tower has no cache


define_operator(
    "bidirectional_attention(Tensor query, Tensor keys, Tensor values, float scale) -> Tensor",
    CPU=bidirectional_attention,
    Meta=shape_of_first,
)
register_attention_op(BIDIRECTIONAL, store_op=_store, compute_op=_compute)

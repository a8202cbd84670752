# SPDX-License-Identifier: Apache-2.0
"""Attention of a vision tower, as an FMS attention algorithm.

FMS's own, ``sdpa_bidirectional``, tells the layout of keys by comparing their length with the
number of heads, and is wrong for an image that has as many patches as the tower has heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from fms.modules.attention import register_attention_op

BIDIRECTIONAL = "spyre_mm_bidirectional"
"""Name of the algorithm, FMS's ``attn_name``."""


def _attend(
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
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), scale=scale_factor
    )
    return attended.transpose(1, 2).contiguous()


def _store(*_: Any, **__: Any) -> Any:
    raise NotImplementedError  # a vision tower has no cache


register_attention_op(BIDIRECTIONAL, store_op=_store, compute_op=_attend)

# SPDX-License-Identifier: Apache-2.0
"""The kernel for RoPE.

FMS's RoPE is interleaved (it rotates neighbouring pairs), which Inductor does not vectorise: a
tenth of a prefill. The kernel computes the same, in the order of FMS's weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from fms.modules.positions import PositionEncoder, RotaryEmbedding
from torch import nn

from vllm_spyre_mm.model_executor.cpu.kernels.kernel import (
    POINTER,
    SIZE,
    Kernel,
    with_contiguous_heads,
)
from vllm_spyre_mm.model_executor.cpu.kernels.operands import RopeAngles
from vllm_spyre_mm.model_executor.cpu.memory import empty_result
from vllm_spyre_mm.model_executor.cpu.operators import define_operator
from vllm_spyre_mm.model_executor.models.mrope import StepRope

LANES = 16
"""The kernel takes heads whose width is a multiple of this."""

KERNEL = Kernel(
    "rope", ("generic",), (torch.bfloat16, torch.float32), (*[POINTER] * 6, *[SIZE] * 6), SIZE
)


class CpuRope(PositionEncoder):
    """FMS's RoPE with the kernel, from a cos/sin table of the model's positions.

    Args:
        original: the module to replace; its table has been computed.
    """

    def __init__(self, original: RotaryEmbedding) -> None:
        define_rope()
        ((rotations,),) = (tables.values() for tables in original.cached_freqs.values())
        self.table = rotations[
            ..., 0
        ].contiguous()  # cos and sin: the first column of the rotation matrix

    def adjusted_qk(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_kv_state: Any = None,
        use_cache: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply RoPE to ``(1, length, heads, head_dim)`` at int64 ``(1, length)``, contiguous."""
        assert position_ids is not None, "positions are given"
        assert len(q) == 1, "the tokens of a step are in one row"
        return torch.ops.spyre_mm.rope(q, k, position_ids, self.table)


class CpuStepRope(PositionEncoder):
    """:class:`StepRope` with the kernel: a step's table is given in place of its positions."""

    def __init__(self) -> None:
        define_rope()

    def adjusted_qk(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_kv_state: Any = None,
        use_cache: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply RoPE to ``(1, length, heads, head_dim)`` with ``StepRope.columns``."""
        assert position_ids is not None, "cosines and sines are given"
        return torch.ops.spyre_mm.rope(q, k, None, position_ids)


def takes_columns(rope: StepRope) -> bool:
    """Whether :class:`CpuStepRope` can take the place of a module."""
    return rope.head_dim % LANES == 0


def replace_rope(blocks: nn.ModuleList) -> None:
    """Let a decoder's blocks share a module with the kernel where that computes the same, in place.

    The tables of replaced modules are freed.
    """
    attentions: list[Any] = [
        part for part in blocks.modules() if getattr(part, "position_encoder", None) is not None
    ]
    for original in {attention.position_encoder for attention in attentions}:
        if (replacement := _replacement(original)) is None:
            continue
        for attention in attentions:
            if attention.position_encoder is original:
                attention.position_encoder = replacement
        original.cached_freqs.clear()


def _replacement(original: PositionEncoder) -> PositionEncoder | None:
    """The module with the kernel that computes the same, None if there is none."""
    if isinstance(original, StepRope):
        return CpuStepRope() if takes_columns(original) else None
    if type(original) is not RotaryEmbedding or original.rope_type == "yarn":
        return None
    if original.partial_rope != 1.0 or original.dim % LANES:
        return None
    return CpuRope(original)


def define_rope() -> None:
    """Define the operator, if it is not."""
    define_operator(
        "rope(Tensor query, Tensor keys, Tensor? position_ids, Tensor table) -> (Tensor, Tensor)",
        CPU=rotate,
        Meta=_rotated_shapes,
    )


def _rotated_shapes(
    query: torch.Tensor, keys: torch.Tensor, *_: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape)


def rotate(
    query: torch.Tensor, keys: torch.Tensor, position_ids: torch.Tensor | None, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implements the operator ``rope``: apply RoPE to queries and keys.

    Raises:
        IndexError: a position is not in the table.
    """
    _, length, heads, head_dim = query.shape
    angles = RopeAngles(position_ids, table)
    query, keys = with_contiguous_heads(query), with_contiguous_heads(keys)
    rotated_query, rotated_keys = (empty_result(part, part.shape) for part in (query, keys))
    beyond = load_kernel(head_dim, query.dtype)(
        query.data_ptr(),
        keys.data_ptr(),
        rotated_query.data_ptr(),
        rotated_keys.data_ptr(),
        *angles.addresses,
        length,
        heads,
        keys.shape[2],
        query.stride(1),
        keys.stride(1),
        angles.num_positions,
    )
    if beyond:
        raise IndexError(f"{beyond} positions are beyond the model's {angles.num_positions}")
    return rotated_query, rotated_keys


def load_kernel(head_dim: int, dtype: torch.dtype) -> Callable[..., int]:
    """Compile the kernel for heads of this width, or find it in Inductor's cache."""
    return KERNEL.load(HEAD_DIM=head_dim, BF16=int(dtype == torch.bfloat16))

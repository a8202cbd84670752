# SPDX-License-Identifier: Apache-2.0
"""The registry of kernels, and which of them a model needs; they are compiled beside the warmup."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from vllm_spyre_mm.model_executor.cpu.kernels import (
    blocked_attention,
    paged_decode,
    rope,
    rows_linear,
    tiled_linear,
)
from vllm_spyre_mm.model_executor.cpu.kernels.kernel import Kernel

KERNELS: tuple[Kernel, ...] = (
    rope.KERNEL,
    paged_decode.KERNEL,
    blocked_attention.KERNEL,
    tiled_linear.KERNEL,
    rows_linear.KERNEL,
)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that kernels are compiled for.

    Attributes:
        dtype: of keys, values and activations.
        head_dim: width of the decoder's heads.
        kv_heads: KV heads of the decoder on this rank.
        group: query heads that share a KV head.
        block_size: tokens in a block of the KV cache.
        tower_head_dim: width of the vision tower's heads, None without a tower.
    """

    dtype: torch.dtype
    head_dim: int
    kv_heads: int
    group: int
    block_size: int
    tower_head_dim: int | None


def loaders(shape: ModelShape) -> list[Callable[[], object]]:
    """Functions that each compile one of the kernels that a model needs and the tier has."""
    needed: list[Callable[[], object]] = [
        each.KERNEL.load for each in (tiled_linear, rows_linear) if each.KERNEL.takes(shape.dtype)
    ]
    for head_dim in {shape.head_dim, shape.tower_head_dim or shape.head_dim}:
        if blocked_attention.supports(head_dim, shape.dtype):
            needed.append(partial(blocked_attention.KERNEL.load, HEAD_DIM=head_dim))
    if paged_decode.supports(shape.head_dim, shape.dtype):
        heads = (shape.head_dim, shape.group, shape.kv_heads)
        needed += [
            partial(paged_decode.load_kernel, *heads, shape.block_size, shape.dtype),
            partial(rope.load_kernel, shape.head_dim, shape.dtype),
        ]
    return needed

# SPDX-License-Identifier: Apache-2.0
"""The compiled store of new keys and values: one call where PyTorch takes eight."""

from collections.abc import Callable

import torch

from vllm_spyre_mm.model_executor.cpu.kernels.kernel import (
    POINTER,
    SIZE,
    Kernel,
    heads_side_by_side,
)

KERNEL = Kernel(
    "paged_store",
    ("generic",),
    (torch.bfloat16, torch.float32),
    (*[POINTER] * 5, *[SIZE] * 4),
    SIZE,
)
"""Compiled with ``BYTES``, of the keys of a token."""


def kernel(token_bytes: int) -> Callable[..., int]:
    """Compile for tokens of this size, or find it in Inductor's cache."""
    return KERNEL.load(BYTES=token_bytes)


def paged_store(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write ``(1, tokens, kv_heads, head_dim)`` to rows of the caches.

    Args:
        keys: of the new tokens.
        values: likewise.
        key_cache: ``(blocks, block_size, kv_heads, head_dim)``, contiguous, of the dtype of keys.
        value_cache: likewise.
        slot_mapping: int64 ``(1, tokens)``, contiguous: the row of each token.

    Raises:
        IndexError: a cache has no such row.
    """
    keys, values = heads_side_by_side(keys), heads_side_by_side(values)
    _, tokens, kv_heads, head_dim = keys.shape
    size = keys.itemsize
    num_slots = key_cache.shape[0] * key_cache.shape[1]
    beyond = kernel(kv_heads * head_dim * size)(
        keys.data_ptr(),
        values.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        slot_mapping.data_ptr(),
        tokens,
        keys.stride(1) * size,
        values.stride(1) * size,
        num_slots,
    )
    if beyond:
        raise IndexError(f"{beyond} slots are beyond the {num_slots} of the cache")

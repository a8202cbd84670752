# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache: its description for vLLM, its size and its allocation."""

import math
import mmap
from typing import TYPE_CHECKING

import torch

from vllm_spyre_mm.host_memory import host_memory, process_memory
from vllm_spyre_mm.model_executor.spec import KVCacheOptions

if TYPE_CHECKING:
    from vllm.config import CacheConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

KVCache = list[tuple[torch.Tensor, torch.Tensor]]
"""For each layer keys and values, ``(blocks, block_size, kv_heads, head_dim)`` each."""

ACTIVATION_RESERVE = 1 << 30
"""Bytes of host memory left for activations when the KV cache is sized."""


def kv_cache_spec(
    options: KVCacheOptions, block_size: int, dtype: torch.dtype, world_size: int
) -> dict[str, "KVCacheSpec"]:
    """The KV cache of each layer on one rank, as vLLM's block manager is told of it."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=options.num_kv_heads // world_size,
        head_size=options.head_dim,
        dtype=dtype,
    )
    return {f"layers.{i}.attn": spec for i in range(options.num_layers)}


def kv_cache_bytes(
    vllm_config: "VllmConfig", spec: dict[str, "KVCacheSpec"], share: int | None = None
) -> int:
    """Memory for this rank's KV cache, in bytes.

    It is that of ``--num-gpu-blocks-override`` if given, as it always is on a card, or
    ``--kv-cache-memory-bytes``, else what ``max_num_seqs`` sequences of ``max_model_len`` can use,
    but at most the share ``--gpu-memory-utilization`` of the host's memory less what is used and
    what activations need.

    Args:
        vllm_config: the engine's configuration.
        spec: of the layers, on this rank.
        share: what the engine may take of the host's memory, in bytes, where it has it not alone.

    Raises:
        ValueError: not enough memory is available for it.
    """
    from vllm.utils.math_utils import cdiv

    config: CacheConfig = vllm_config.cache_config
    block_bytes = sum(layer.page_size_bytes for layer in spec.values())
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override * block_bytes
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    world_size = vllm_config.parallel_config.world_size
    if share is None:
        available = _left_of_host(config.gpu_memory_utilization) // world_size
    else:
        available = _left_of_share(share // world_size, ACTIVATION_RESERVE // world_size)
    blocks_per_sequence = cdiv(
        vllm_config.model_config.max_model_len, vllm_config.cache_config.block_size
    )
    # One more: block 0 is used for padding and never allocated.
    useful_blocks = blocks_per_sequence * vllm_config.scheduler_config.max_num_seqs + 1
    return min(available, useful_blocks * block_bytes)


def _left_of_host(utilization: float) -> int:
    """Bytes that an engine with the host to itself has for its KV cache."""
    memory = host_memory()
    left = memory.free(utilization) - ACTIVATION_RESERVE
    if left <= 0:
        raise ValueError(
            f"no host memory is left for the KV cache: {memory.taken / 2**30:.1f} of "
            f"{memory.total / 2**30:.1f} GiB are taken, and --gpu-memory-utilization "
            f"allows {memory.total * utilization / 2**30:.1f} GiB of which activations need 1 GiB. "
            "Free memory, raise --gpu-memory-utilization, or give --kv-cache-memory-bytes"
        )
    return left


def _left_of_share(share: int, reserve: int) -> int:
    """Bytes that a rank has for its KV cache of its share of the host."""
    taken = process_memory()
    left = share - taken - reserve
    if left <= 0:
        raise ValueError(
            f"no host memory is left for the KV cache: this rank's share of it is "
            f"{share / 2**30:.1f} GiB, of which {taken / 2**30:.1f} GiB are taken and activations "
            f"need {reserve / 2**30:.1f} GiB. Start fewer data-parallel engines on this host, "
            "raise --gpu-memory-utilization, or give --kv-cache-memory-bytes"
        )
    return left


def allocate_kv_cache(
    options: KVCacheOptions,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    world_size: int,
) -> KVCache:
    """Allocate the cache of one rank on the host; call it in the context in which steps run.

    Blocks that are never used take no memory.
    """
    shape = (num_blocks, block_size, options.num_kv_heads // world_size, options.head_dim)
    return [(_zeros(shape, dtype), _zeros(shape, dtype)) for _ in range(options.num_layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose pages are allocated at their first write; ``torch.zeros`` would write all."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=private)
    # In place, so that the tensor is no view: the card's compiler may tell views from others.
    return torch.frombuffer(pages, dtype=dtype).resize_(shape)

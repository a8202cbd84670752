# SPDX-License-Identifier: Apache-2.0
"""The KV cache is described, sized and allocated the same way on every rank."""

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from vllm_spyre_mm.host_memory import HostMemory
from vllm_spyre_mm.model_executor import kv_cache
from vllm_spyre_mm.model_executor.kv_cache import (
    ACTIVATION_RESERVE,
    allocate_kv_cache,
    kv_cache_bytes,
    kv_cache_spec,
)
from vllm_spyre_mm.model_executor.spec import KVCacheOptions

OPTIONS = KVCacheOptions(num_layers=3, num_kv_heads=4, head_dim=32)
GIB = 1 << 30


def config(
    *,
    explicit: int | None = None,
    blocks: int | None = None,
    utilization: float = 0.5,
    max_model_len: int = 1000,
    max_num_seqs: int = 4,
    world_size: int = 1,
) -> Any:
    """The part of a vLLM configuration that is looked at."""
    return SimpleNamespace(
        cache_config=SimpleNamespace(
            kv_cache_memory_bytes=explicit,
            num_gpu_blocks_override=blocks,
            gpu_memory_utilization=utilization,
            block_size=64,
        ),
        parallel_config=SimpleNamespace(world_size=world_size),
        model_config=SimpleNamespace(max_model_len=max_model_len),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
    )


def host(monkeypatch: pytest.MonkeyPatch, total: float, available: float) -> None:
    """A host with this much memory, in GiB."""
    memory = HostMemory(int(total * GIB), int(available * GIB))
    monkeypatch.setattr(kv_cache, "host_memory", lambda: memory)


def spec(world_size: int = 1, dtype: torch.dtype = torch.float16) -> Any:
    return kv_cache_spec(OPTIONS, 64, dtype, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_description_is_what_is_allocated(world_size: int, dtype: torch.dtype):
    layers = spec(world_size, dtype)
    cache = allocate_kv_cache(OPTIONS, 5, 64, dtype, world_size)
    assert len(layers) == len(cache) == OPTIONS.num_layers
    for layer, (keys, values) in zip(layers.values(), cache, strict=True):
        assert keys.shape == values.shape == (5, 64, 4 // world_size, 32)
        assert keys.dtype == values.dtype == layer.dtype == dtype
        assert (layer.block_size, layer.num_kv_heads, layer.head_size) == keys.shape[1:]
        assert keys.nbytes + values.nbytes == 5 * layer.page_size_bytes


def test_no_two_layers_share_memory():
    cache = allocate_kv_cache(OPTIONS, 2, 64, torch.float32, 1)
    tensors = [tensor for pair in cache for tensor in pair]
    assert len({tensor.data_ptr() for tensor in tensors}) == 6
    assert all((tensor == 0).all() for tensor in tensors)


def test_blocks_that_are_not_used_take_no_memory():
    """A GiB is described, and one block of it written."""
    process = psutil.Process()
    before = process.memory_info().rss
    cache = allocate_kv_cache(OPTIONS, GIB // 2 // 3 // (64 * 4 * 32 * 4), 64, torch.float32, 1)
    for keys, values in cache:
        with torch.inference_mode():  # as the worker's steps
            keys[-1], values[-1] = 1.0, 2.0
        assert values[-1].min() == 2 > values[0].max() == 0
    assert sum(keys.nbytes + values.nbytes for keys, values in cache) > 0.99 * GIB
    assert process.memory_info().rss - before < GIB // 16


def test_an_engine_among_others_has_its_share_less_what_is_its_own(
    monkeypatch: pytest.MonkeyPatch,
):
    """What others have taken by then is theirs."""
    host(monkeypatch, total=16, available=0)
    monkeypatch.setattr(kv_cache, "process_memory", lambda: GIB // 2)
    many = config(max_num_seqs=100_000, max_model_len=100_000, world_size=2)
    assert kv_cache_bytes(many, spec(2), share=4 * GIB) == 2 * GIB - GIB // 2 - GIB // 2
    with pytest.raises(ValueError, match="Start fewer data-parallel engines") as error:
        kv_cache_bytes(many, spec(2), share=2 * GIB)
    assert "share of it is 1.0 GiB, of which 0.5 GiB are taken" in str(error.value)


def test_what_the_user_gives_wins(monkeypatch: pytest.MonkeyPatch):
    host(monkeypatch, total=8, available=0)
    assert kv_cache_bytes(config(explicit=12345), spec()) == 12345


def test_a_number_of_blocks_wins_over_all(monkeypatch: pytest.MonkeyPatch):
    """On a card there always is one, and the host's memory says nothing of the card's."""
    host(monkeypatch, total=8, available=0)
    page = sum(layer.page_size_bytes for layer in spec().values())
    assert kv_cache_bytes(config(blocks=7), spec()) == 7 * page
    assert kv_cache_bytes(config(explicit=12345, blocks=7), spec()) == 7 * page


def test_a_large_host_gives_what_all_requests_can_use(monkeypatch: pytest.MonkeyPatch):
    """16 blocks for each of 4 sequences of 1000 tokens, and block 0."""
    host(monkeypatch, total=1000, available=900)
    page = sum(layer.page_size_bytes for layer in spec().values())
    assert page == 2 * 3 * 64 * 4 * 32 * 2
    assert kv_cache_bytes(config(), spec()) == (16 * 4 + 1) * page


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_small_host_gives_its_share_less_what_is_taken(
    monkeypatch: pytest.MonkeyPatch, world_size: int
):
    host(monkeypatch, total=16, available=14)
    many = config(max_num_seqs=100_000, max_model_len=100_000, world_size=world_size)
    expected = (8 * GIB - 2 * GIB - ACTIVATION_RESERVE) // world_size
    assert kv_cache_bytes(many, spec(world_size)) == expected


@pytest.mark.parametrize("available", [0, 9, 1 + 8])
def test_no_memory_is_refused_with_figures_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, available: float
):
    """The share is half of 16 GiB; what is taken and the activations' GiB leave nothing of it."""
    host(monkeypatch, total=16, available=available)
    with pytest.raises(ValueError, match="no host memory is left") as error:
        kv_cache_bytes(config(), spec())
    message = str(error.value)
    assert f"{16 - available:.1f} of 16.0 GiB" in message
    assert "allows 8.0 GiB" in message
    for flag in ("--gpu-memory-utilization", "--kv-cache-memory-bytes"):
        assert flag in message

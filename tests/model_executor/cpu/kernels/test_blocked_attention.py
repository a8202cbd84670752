# SPDX-License-Identifier: Apache-2.0
"""The compiled attention of many queries computes what attention in float64 does.

On a CPU below AVX-512 PyTorch's attention stands in.
"""

import pytest
import torch
from fms.modules.attention import get_attention_type
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tiers import on_distinct_tiers, on_vector_tiers
from vllm_spyre_mm.model_executor.cpu.bidirectional import BIDIRECTIONAL
from vllm_spyre_mm.model_executor.cpu.kernels import blocked_attention
from vllm_spyre_mm.model_executor.cpu.kernels.operands import PagedKV

TOWERS = [
    *((1, 729, 16, 72), (2, 577, 4, 64), (3, 256, 6, 64), (1, 1700, 2, 64), (2, 1, 3, 34)),
    *((3, 40, 2, 128), (1, 127, 1, 16), (1, 31, 2, 48), (2, 33, 2, 80), (1, 800, 1, 256)),
]
"""Tiles, positions, heads and their width: SigLIP's, CLIP's, and others that fill tiles or not."""


def qkv(tiles: int, positions: int, heads: int, head_dim: int) -> list[torch.Tensor]:
    """Parts of a fused projection: side by side in memory."""
    generator = torch.Generator().manual_seed(positions)
    fused = torch.randn(tiles, positions, 3, heads, head_dim, generator=generator)
    return list(fused.bfloat16().unbind(2))


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    heads = query.shape[2]
    compute = get_attention_type(attn_name=BIDIRECTIONAL)["compute_prefill"]
    return compute(query, keys, values, heads, heads, 0.0, None)


def exact(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), keys.double())
    weights = (scores * query.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values.double())


def compiled_attend(*parts: torch.Tensor) -> torch.Tensor:
    return torch.ops.spyre_mm.bidirectional_attention(*parts, parts[0].shape[-1] ** -0.5)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", TOWERS, ids=str)
def test_every_position_attends_to_every_other(shape: tuple[int, int, int, int]):
    parts = qkv(*shape)
    attended = compiled_attend(*parts)
    assert attended.is_contiguous()
    assert attended.dtype == torch.bfloat16
    assert relative_error(attended, exact(*parts)) < 4e-3


@on_distinct_tiers
@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("shape", TOWERS[:2], ids=str)
def test_every_position_attends_to_every_other_in_each_tier(shape: tuple[int, int, int, int]):
    parts = qkv(*shape)
    assert relative_error(compiled_attend(*parts), exact(*parts)) < 4e-3


def test_scores_of_any_size_are_weighed():
    """Greater ones block by block; one key far ahead of the others, in the last run; all alike."""
    query, keys, values = qkv(1, 1000, 2, 64)
    rising = keys * torch.linspace(0, 60, 1000).view(-1, 1, 1).bfloat16()
    ahead = keys.clone()
    ahead[:, 990] = 40 * query[:, 5]
    for scored in (rising, ahead, torch.zeros_like(keys)):
        attended = compiled_attend(query, scored, values)
        assert relative_error(attended, exact(query, scored, values)) < 4e-3


def test_other_layouts_and_fp32_are_taken():
    parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in qkv(2, 50, 4, 64)]
    assert relative_error(compiled_attend(*parts), exact(*parts)) < 4e-3
    single = [part.float() for part in parts]
    assert relative_error(compiled_attend(*single), exact(*single)) < 1e-6


@pytest.mark.parametrize("position", [3, 70, 899])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_reach_the_result(value: float, position: int):
    query, keys, values = qkv(1, 900, 2, 64)
    query[..., 0] = query[..., 0].abs() + 1
    keys[0, position, 1, 0] = value
    attended = compiled_attend(query, keys, values)
    assert attended[:, :, 1].isnan().all()
    assert not attended[:, :, 0].isnan().any()


def test_one_graph_without_a_break_serves_tiles_and_positions():
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(attend, backend=counter, dynamic=True, fullgraph=True)
    for shape in ((2, 30, 4, 64), (3, 41, 4, 64)):
        parts = qkv(*shape)
        assert relative_error(compiled(*parts), exact(*parts)) < 4e-3
    assert counter.frame_count == 1
    targets = {str(node.target) for node in counter.graphs[0].graph.nodes}
    assert "spyre_mm.bidirectional_attention" in targets


def test_nothing_is_compiled_where_nothing_is_asked_to_be(monkeypatch: pytest.MonkeyPatch):
    """An eager engine needs no C++ compiler."""
    monkeypatch.setattr(blocked_attention, "attend_bidirectionally", None)
    parts = qkv(2, 30, 4, 64)
    assert relative_error(attend(*parts), exact(*parts)) < 4e-3


@on_vector_tiers
@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("context", [0, 64, 1000])
@pytest.mark.parametrize("tokens", [2, 500])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 64), (4, 1, 128), (3, 3, 72)])
def test_tokens_of_a_chunk_attend_to_earlier_ones(
    context: int, tokens: int, heads: int, kv_heads: int, head_dim: int
):
    """Through blocks in any order; what is in no block of the sequence is not read."""
    block_size = 16
    num_keys = context + tokens
    query, keys, values = (part[0] for part in qkv(1, num_keys, heads, head_dim))
    own = [part[:, :kv_heads] for part in (keys, values)]
    used = -(-num_keys // block_size)
    blocks = torch.randperm(used, generator=torch.Generator().manual_seed(0)) + 1
    caches = torch.full((2, used + 2, block_size, kv_heads, head_dim), torch.nan).bfloat16()
    for cache, part in zip(caches, own, strict=True):
        for block, rows in zip(blocks, part.split(block_size), strict=True):
            cache[block, : len(rows)] = rows
    lengths = torch.tensor([num_keys], dtype=torch.int32)
    kv = PagedKV(*caches, blocks.int().unsqueeze(0), lengths)
    attended = blocked_attention.attend_causally(query[context:], kv, head_dim**-0.5)
    shared = [part.repeat_interleave(heads // kv_heads, 1).double() for part in own]
    scores = torch.einsum("qhd,khd->hqk", query[context:].double(), shared[0]) * head_dim**-0.5
    ends = torch.arange(context, num_keys).unsqueeze(1)
    scores.masked_fill_(torch.arange(num_keys) > ends, -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), shared[1])
    assert relative_error(attended, expected) < 4e-3

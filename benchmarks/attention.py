# SPDX-License-Identifier: Apache-2.0
"""The attention op on a paged cache, beside PyTorch's on keys and values that lie side by side."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.measure import Row, compare, interleaved
from vllm_spyre_mm.model_executor.cpu.attention import (
    CPU_COMPILED_ATTENTION,
    cpu_attention_kwargs,
    register_cpu_attention,
)

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, CHUNK = 8, 2, 128, 64, 512
SECTION = "attention"
REFERENCE = "SDPA, contiguous K and V"


def attention_rows(quick: bool) -> Iterator[Row]:
    """Prefill of a chunk after growing contexts, and decode of growing batches."""
    register_cpu_attention()
    for total in (512, 2048, 8192) if quick else (512, 1024, 2048, 4096, 8192):
        yield _row(f"prefill of {CHUNK}, {total} keys", 1, CHUNK, total, quick)
    for context in (1000,) if quick else (1000, 4000):
        for batch in (1, 4, 16, 32):
            yield _row(f"decode of {batch}, {context} keys", batch, 1, context, quick)


def _row(name: str, batch: int, queries: int, total: int, quick: bool) -> Row:
    paged, contiguous = _cases(batch, queries, total)
    torch.testing.assert_close(paged(), contiguous(), rtol=3e-2, atol=3e-2)
    timings = interleaved({"paged": paged, "contiguous": contiguous}, 9 if quick else 25, warmups=2)
    return compare(SECTION, name, timings["paged"], timings["contiguous"], REFERENCE)


def _cases(
    batch: int, queries: int, total: int
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """Both give ``(batch, queries, heads, head_dim)``."""
    from fms.modules.attention import get_attention_type

    width = -(-total // BLOCK_SIZE)
    shape = (batch * width + 1, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    key_cache, value_cache = (torch.randn(shape).bfloat16() for _ in range(2))
    table = (torch.randperm(batch * width) + 1).view(batch, width)
    query = torch.randn(batch, queries, HEADS, HEAD_DIM).bfloat16()
    lengths = torch.full((batch,), total)
    kwargs = cpu_attention_kwargs(table, lengths, torch.zeros_like(lengths), queries, BLOCK_SIZE)
    compute = get_attention_type(attn_name=CPU_COMPILED_ATTENTION)["compute_prefill"]
    scale = HEAD_DIM**-0.5

    def paged() -> torch.Tensor:
        return compute(query, key_cache, value_cache, HEADS, KV_HEADS, 0.0, scale, **kwargs)

    keys, values = (
        cache[table].flatten(1, 2)[:, :total].transpose(1, 2).contiguous()
        for cache in (key_cache, value_cache)
    )
    group = HEADS // KV_HEADS
    if queries == 1:  # the queries that share a KV head as rows of one head: the fastest way

        def contiguous() -> torch.Tensor:
            rows = query.view(batch, KV_HEADS, group, HEAD_DIM)
            return F.scaled_dot_product_attention(rows, keys, values, scale=scale).view_as(query)

        return paged, contiguous

    repeated = [part.repeat_interleave(group, 1) for part in (keys, values)]
    ends = torch.arange(total - queries, total).unsqueeze(1)
    mask = torch.zeros(queries, total, dtype=torch.bfloat16)
    mask.masked_fill_(torch.arange(total) > ends, -torch.inf)

    def contiguous_chunk() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query.transpose(1, 2), *repeated, attn_mask=mask, scale=scale
        ).transpose(1, 2)

    return paged, contiguous_chunk

# SPDX-License-Identifier: Apache-2.0
"""Steps of the CPU's paged attention, drawn and made."""

from dataclasses import dataclass
from typing import Any

import fms.utils.spyre.paged  # noqa: F401 - registers the reference
import torch
from fms.modules.attention import get_attention_type
from hypothesis import settings
from hypothesis import strategies as st

from vllm_spyre_mm.model_executor.cpu.attention import (
    CPU_ATTENTION,
    CPU_COMPILED_ATTENTION,
    cpu_attention_kwargs,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
CPU_ALGORITHMS = st.sampled_from([CPU_ATTENTION, CPU_COMPILED_ATTENTION])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
EXTRA_BLOCKS = 3
"""Blocks of other requests in every cache, block 0 besides."""


@dataclass(frozen=True)
class Shape:
    """What a step looks like, without its numbers.

    Attributes:
        lengths: tokens of each sequence after the step.
        query_length: tokens of each that the step computes.
        padding_blocks: whole blocks of padding before the longest sequence.
        block_size: tokens in a block.
        kv_heads: KV heads.
        group: query heads that share a KV head.
        head_dim: width of a head.
        seed: of the numbers and of the order of the blocks.
    """

    lengths: list[int]
    query_length: int = 1
    padding_blocks: int = 0
    block_size: int = 4
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    seed: int = 0


@dataclass
class Step:
    """One call of an attention layer, with a cache full of random numbers.

    ``own`` are the cache rows that hold each sequence's tokens, in order.
    """

    shape: Shape
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    caches: tuple[torch.Tensor, torch.Tensor]
    kwargs: dict[str, torch.Tensor]
    own: list[list[int]]

    def run(self, attn_name: str, **more: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Store and attend on copies of the caches: attended values, and both caches."""
        algorithm = get_attention_type(attn_name=attn_name)
        kwargs = {**self.kwargs, **more}
        scale = kwargs.pop("scale", None)
        caches = (cache.clone() for cache in self.caches)
        keys, values, key_cache, value_cache = algorithm["store"](
            self.keys, self.values, *caches, **kwargs
        )
        attended = algorithm["compute_decode"](
            query=self.query,
            key_cache=keys,
            value_cache=values,
            nheads=self.query.shape[2],
            kvheads=self.keys.shape[2],
            p_dropout=0.0,
            scale_factor=scale,
            **kwargs,
        )
        return attended, key_cache, value_cache

    def cpu_kwargs(self) -> dict[str, torch.Tensor]:
        return cpu_attention_kwargs(
            self.kwargs["block_table"],
            self.kwargs["current_tkv_mask"],
            self.kwargs["left_padded_prompt_mask"],
            self.shape.query_length,
            self.shape.block_size,
        )


def make_step(shape: Shape, dtype: torch.dtype = torch.float32) -> Step:
    """Blocks in random order, sequences padded on the left with block 0 to one width."""
    generator = torch.Generator().manual_seed(shape.seed)
    size, batch = shape.block_size, len(shape.lengths)
    counts = [-(-length // size) for length in shape.lengths]
    width = max(counts) + shape.padding_blocks
    num_blocks = 1 + sum(counts) + EXTRA_BLOCKS
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    tables, own = [], []
    for length, count in zip(shape.lengths, counts, strict=True):
        blocks = [free.pop() for _ in range(count)]
        tables.append([0] * (width - count) + blocks)
        own.append([blocks[i // size] * size + i % size for i in range(length)])
    padding = torch.tensor([(width - count) * size for count in counts])

    def random(*dims: int) -> torch.Tensor:
        return torch.randn(dims, generator=generator).to(dtype)

    new = (batch, shape.query_length)
    cache = (num_blocks, size, shape.kv_heads, shape.head_dim)
    return Step(
        shape=shape,
        query=random(*new, shape.kv_heads * shape.group, shape.head_dim),
        keys=random(*new, shape.kv_heads, shape.head_dim),
        values=random(*new, shape.kv_heads, shape.head_dim),
        caches=(random(*cache), random(*cache)),
        kwargs={
            "slot_mapping": torch.tensor([slots[-shape.query_length :] for slots in own]),
            "block_table": torch.tensor(tables),
            "current_tkv_mask": padding + torch.tensor(shape.lengths),
            "left_padded_prompt_mask": padding,
        },
        own=own,
    )


heads = {
    "padding_blocks": st.integers(0, 2),
    "block_size": st.sampled_from([4, 8]),
    "kv_heads": st.integers(1, 3),
    "group": st.sampled_from([1, 2, 4]),
    "seed": st.integers(0, 10_000),
}
decodes = st.builds(
    Shape,
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    query_length=st.just(1),
    **heads,
)


@st.composite
def prefills(draw: st.DrawFn) -> Shape:
    """One chunk of one prompt without padding, after a context of whole blocks."""
    values = {name: draw(strategy) for name, strategy in heads.items()}
    context = draw(st.integers(0, 4)) * values["block_size"]
    chunk = draw(st.integers(1, 20))
    return Shape(lengths=[context + chunk], query_length=chunk, **values)


steps = decodes | prefills()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

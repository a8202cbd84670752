# SPDX-License-Identifier: Apache-2.0
"""The store of keys and values: slots are written in place, and nothing else is."""

import fms.utils.spyre.paged  # noqa: F401 - registers the reference
import pytest
import torch
from fms.modules.attention import get_attention_type
from hypothesis import given

from tests.model_executor.cpu.attention_steps import PROPERTY, TOLERANCE, Shape, make_step, steps
from vllm_spyre_mm.model_executor.cpu.attention import (
    CPU_ATTENTION,
    register_cpu_attention,
)


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register_cpu_attention()


@given(steps)
@PROPERTY
def test_a_store_writes_its_slots_in_place_and_nothing_else(shape: Shape):
    step = make_step(shape)
    before = [cache.clone() for cache in step.caches]
    store = get_attention_type(attn_name=CPU_ATTENTION)["store"]
    returned = store(step.keys, step.values, *step.caches, **step.kwargs)
    for cache, result in zip(step.caches * 2, returned, strict=True):
        assert result is cache
    slots = step.kwargs["slot_mapping"].flatten()
    for cache, old, new in zip(step.caches, before, (step.keys, step.values), strict=True):
        expected = old.flatten(0, 1)
        expected[slots] = new.flatten(0, 1)
        assert torch.equal(cache.flatten(0, 1), expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 7, 90])
def test_a_store_takes_parts_of_a_row(dtype: torch.dtype, tokens: int):
    """Keys and values lie beside the queries, as a fused projection leaves them."""
    heads, width, num_slots = 2, 8, 128
    row = torch.randn(1, tokens, 5 * width * heads).to(dtype)
    keys, values = (row[..., i * 16 :][..., :16].view(1, tokens, heads, width) for i in (3, 4))
    caches = tuple(torch.randn(num_slots // 4, 4, heads, width).to(dtype) for _ in range(2))
    expected = [cache.clone() for cache in caches]
    slots = torch.randperm(num_slots)[None, :tokens].contiguous()
    for cache, new in zip(expected, (keys, values), strict=True):
        cache.flatten(0, 1)[slots[0]] = new[0]
    store = get_attention_type(attn_name=CPU_ATTENTION)["store"]
    store(keys, values, *caches, slot_mapping=slots)
    assert all(torch.equal(*pair) for pair in zip(caches, expected, strict=True))


@pytest.mark.parametrize("slot", [-1, 128])
def test_a_slot_that_the_cache_has_not_is_refused(slot: int):
    """The cache is a part of what memory there is: beside it nothing is written."""
    new, memory = torch.randn(1, 1, 2, 8), torch.zeros(34, 4, 2, 8)
    cache = memory[1:33]
    store = get_attention_type(attn_name=CPU_ATTENTION)["store"]
    with pytest.raises(IndexError, match=f"index {slot} is out of bounds"):
        store(new, new, cache, cache, slot_mapping=torch.tensor([[slot]]))
    assert not memory.any()


@pytest.mark.parametrize("missing", [0, 1])
def test_a_store_without_a_cache_is_refused(missing: int):
    step = make_step(Shape(lengths=[5]))
    caches = [None if i == missing else cache for i, cache in enumerate(step.caches)]
    with pytest.raises(AssertionError, match="needs a cache"):
        get_attention_type(attn_name=CPU_ATTENTION)["store"](
            step.keys, step.values, *caches, **step.kwargs
        )

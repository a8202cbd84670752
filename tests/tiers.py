# SPDX-License-Identifier: Apache-2.0
"""Another CPU than the one at hand: a lower tier of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vllm_spyre_mm.config import CpuTier
from vllm_spyre_mm.model_executor.cpu_tier import cpu_tier

VECTOR_TIERS: tuple[CpuTier, ...] = ("avx512", "avx512_bf16", "amx")
"""Tiers with bf16 kernels of their own; the others leave bf16 to PyTorch."""

on_vector_tiers = pytest.mark.parametrize("tier", VECTOR_TIERS, indirect=True)

on_distinct_tiers = pytest.mark.parametrize("tier", ["generic", *VECTOR_TIERS], indirect=True)
"""Each tier whose code differs: that of ``avx2`` is the generic one, compiled for it."""


@contextmanager
def force_tier(name: CpuTier) -> Iterator[None]:
    """Compute in this tier, in this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPYRE_MM_CPU_TIER", name)
        cpu_tier.cache_clear()
        yield
    cpu_tier.cache_clear()

# SPDX-License-Identifier: Apache-2.0
"""Another CPU than the one at hand: a lower tier of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vllm_spyre_mm.config import CpuTier
from vllm_spyre_mm.model_executor.cpu_tier import cpu_tier


@contextmanager
def force_tier(name: CpuTier) -> Iterator[None]:
    """Compute in this tier, in this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPYRE_MM_CPU_TIER", name)
        cpu_tier.cache_clear()
        yield
    cpu_tier.cache_clear()

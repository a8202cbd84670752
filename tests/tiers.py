# SPDX-License-Identifier: Apache-2.0
"""Another CPU than the one at hand: a lower tier of it, or AMX in software."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_spyre_mm.config import CPU_TIERS, CpuTier
from vllm_spyre_mm.model_executor.cpu import tier as cpu_tier
from vllm_spyre_mm.model_executor.cpu.kernels import kernel as kernels

VECTOR_TIERS: tuple[CpuTier, ...] = ("avx512", "avx512_bf16", "amx")
"""Tiers with bf16 kernels of their own; the others leave bf16 to PyTorch."""

on_vector_tiers = pytest.mark.parametrize("tier", VECTOR_TIERS, indirect=True)

on_distinct_tiers = pytest.mark.parametrize("tier", ["generic", *VECTOR_TIERS], indirect=True)
"""Each tier whose code differs: that of ``avx2`` is the generic one, compiled for it."""

EMULATION = Path(__file__).parent / "model_executor/cpu/kernels/emulated_amx.h"

INLINE_ASSEMBLY = re.compile(r'asm volatile\("tile(\w+) [^;]*;')
EMULATED = {
    "loadd": "emulated::load(REGISTER, from, 64);",
    "loaddt1": "emulated::load(REGISTER, from, 64);",
    "stored": "emulated::store(REGISTER, to, 64);",
    "zero": "emulated::zero(REGISTER);",
}
"""What takes the place of each instruction that ``amx.h`` writes by itself."""


@contextmanager
def force_tier(name: CpuTier) -> Iterator[None]:
    """Compute in this tier, in this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPYRE_MM_CPU_TIER", name)
        cpu_tier.cpu_tier.cache_clear()
        yield
    cpu_tier.cpu_tier.cache_clear()


def can_emulate_amx() -> bool:
    """Whether this CPU has all that the kernels for AMX take beside its tiles."""
    detected = CPU_TIERS.index(cpu_tier.detect_tier())
    return CPU_TIERS.index("avx512") <= detected < CPU_TIERS.index("amx")


@contextmanager
def emulated_amx() -> Iterator[None]:
    """Compute in the highest tier, with tiles in software, in this process alone."""
    own, written = cpu_tier.INSTRUCTIONS[cpu_tier.detect_tier()], kernels.kernel_source

    def emulating(name: str) -> str:
        text = INLINE_ASSEMBLY.sub(lambda match: EMULATED[match[1]], written(name))
        return f"#define __AMX_BF16__ 1\n{EMULATION.read_text()}\n{text}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cpu_tier.INSTRUCTIONS, "amx", own)
        patch.setattr(cpu_tier, "detect_tier", lambda: "amx")
        patch.setattr(kernels, "kernel_source", emulating)
        kernels.compile_kernel.cache_clear()
        with force_tier("amx"):
            yield
    kernels.compile_kernel.cache_clear()

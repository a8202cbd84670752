# SPDX-License-Identifier: Apache-2.0
"""The CPU's tier of instruction sets: one for the process, which decides every kernel.

Code is compiled for a tier, not for the machine at hand: code from a compile cache runs on every
CPU of its tier, because its key contains the tier's flags. Some releases of PyTorch cannot be told
so for graphs (:mod:`torch_internals`); kernels are always compiled for the tier.
"""

import functools
import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from vllm_spyre_mm.config import CPU_TIERS, CpuTier
from vllm_spyre_mm.environment import cpu_tier_limit
from vllm_spyre_mm.model_executor.cpu.torch_internals import (
    has_onednn,
    inductor_settings,
    takes_architecture,
    why_not_compiled,
)


@dataclass(frozen=True, slots=True)
class Instructions:
    """The instructions that a tier adds to the tiers below it, and how to compile for it.

    Attributes:
        capabilities: names in ``torch.cpu.get_capabilities``.
        march: ``-march`` of GCC and Clang.
        flags: further compiler flags.
        simdlen: width of Inductor's vectors in bits; 1 for none.
    """

    capabilities: tuple[str, ...]
    march: str
    flags: tuple[str, ...]
    simdlen: int


BF16 = ("-mavx512bf16",)

INSTRUCTIONS: dict[CpuTier, Instructions] = {
    "generic": Instructions((), "x86-64", (), 1),
    "avx2": Instructions(("avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt"), "x86-64-v3", (), 256),
    "avx512": Instructions(
        ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"), "x86-64-v4", (), 512
    ),
    "avx512_bf16": Instructions(("avx512_bf16",), "x86-64-v4", BF16, 512),
    "amx": Instructions(
        ("amx_tile", "amx_bf16"), "x86-64-v4", (*BF16, "-mamx-tile", "-mamx-bf16"), 512
    ),
}
"""The tiers of x86-64; on other CPUs the tier is ``generic``, compiled for the machine at hand."""


@functools.cache
def cpu_tier() -> CpuTier:
    """The tier of this process: the CPU's, or what ``SPYRE_MM_CPU_TIER`` lowers it to.

    Raises:
        ValueError: the variable names no tier, or one that the CPU lacks.
    """
    limit, detected = cpu_tier_limit(), detect_tier()
    if limit is None:
        return detected
    if CPU_TIERS.index(limit) > CPU_TIERS.index(detected):
        raise ValueError(f"SPYRE_MM_CPU_TIER={limit}: this CPU has {detected} at most")
    return limit


@functools.cache
def detect_tier() -> CpuTier:
    """The highest tier whose instructions, and those of all below it, the CPU has.

    For AMX the process requests the tile registers from the operating system.
    """
    tier = CPU_TIERS[0]
    if not is_x86():
        return tier
    has = torch.cpu.get_capabilities()
    for higher in CPU_TIERS[1:]:
        if not all(has.get(name, False) for name in INSTRUCTIONS[higher].capabilities):
            return tier
        if higher == "amx" and not torch.cpu._init_amx():
            return tier
        tier = higher
    return tier


def has_tier(tier: CpuTier) -> bool:
    """Whether this process may use the instructions of a tier."""
    return CPU_TIERS.index(cpu_tier()) >= CPU_TIERS.index(tier)


def is_x86() -> bool:
    """Whether the CPU is an x86-64 one."""
    return platform.machine() in ("x86_64", "AMD64")


def computes_in_bf16() -> bool:
    """Whether bf16 is at least as fast as fp32: with AVX-512, or off x86 if oneDNN says so."""
    if is_x86():
        return has_tier("avx512")
    return has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def compiler_settings() -> AbstractContextManager[None]:
    """A context in which Inductor compiles for the tier, its graphs and the project's kernels."""
    if not is_x86():
        return nullcontext()
    instructions = INSTRUCTIONS[cpu_tier()]
    return inductor_settings(instructions.march, instructions.simdlen)


def kernel_flags(tier: CpuTier) -> tuple[str, ...]:
    """The compiler's flags for a kernel of a tier; none where the machine at hand is meant."""
    instructions = INSTRUCTIONS[tier]
    return (f"-march={instructions.march}", *instructions.flags) if is_x86() else ()


def compiled_for() -> str:
    """What graphs are compiled for, in words: a tier, where PyTorch can be told one."""
    if why_not_compiled():
        return "nothing"
    return cpu_tier() if is_x86() and takes_architecture() else "the machine at hand"


def host_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes the host computes in, fastest first: bf16 where it is fast, and fp32.

    fp16 is left out: on a CPU it is many times slower than either.
    """
    if computes_in_bf16():
        return (torch.bfloat16, torch.float32)
    return (torch.float32,)

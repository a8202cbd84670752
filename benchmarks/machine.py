# SPDX-License-Identifier: Apache-2.0
"""Which machine the results are of: its CPU, its cores, and the tier of kernels that it runs."""

import os
import platform
from dataclasses import dataclass

from vllm_spyre_mm.model_executor.cpu.tier import cpu_tier


@dataclass(frozen=True, slots=True)
class Machine:
    """What results are kept by; two machines of the same kind are one.

    Attributes:
        cpu: the processor's name for its model.
        tier: of kernels: ``amx``, ``avx512_bf16``, ``avx512``, ``avx2`` or ``generic``.
        cores: that this process may use.
    """

    cpu: str
    tier: str
    cores: int

    @property
    def title(self) -> str:
        """In a few words."""
        return f"{self.cpu}, {self.cores} cores, tier {self.tier}"


def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(_cpu_name(), kernel_tier(), len(os.sched_getaffinity(0)))


def kernel_tier() -> str:
    """The tier of kernels that an engine takes here; the one place that asks for it."""
    return cpu_tier()


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.processor())

# SPDX-License-Identifier: Apache-2.0
"""A CPU has one tier; a variable lowers it, and nothing is compiled above it."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa

from tests.tiers import force_tier
from vllm_spyre_mm.config import CPU_TIERS, CpuTier
from vllm_spyre_mm.model_executor.cpu import tier as cpu_tier
from vllm_spyre_mm.model_executor.cpu.kernels import registry as kernel_registry
from vllm_spyre_mm.model_executor.cpu.kernels.kernel import Kernel, kernel_source
from vllm_spyre_mm.model_executor.cpu.tier import host_dtypes

AVX2 = ("avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt")
AVX512 = (*AVX2, "avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl")


@pytest.fixture
def undetected(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What was found out about this CPU is forgotten, before and after."""
    monkeypatch.setattr(cpu_tier, "is_x86", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    monkeypatch.setattr(cpu_tier, "detect_tier", cpu_tier.detect_tier.__wrapped__)
    return monkeypatch


@pytest.mark.parametrize(
    ("capabilities", "tier"),
    [
        ((), "generic"),
        (("amx_tile", "amx_bf16", "avx512_bf16"), "generic"),
        (AVX2, "avx2"),
        (AVX512[:-1], "avx2"),
        (AVX512, "avx512"),
        ((*AVX512, "avx512_bf16"), "avx512_bf16"),
        ((*AVX512, "amx_tile", "amx_bf16"), "avx512"),
        ((*AVX512, "avx512_bf16", "amx_tile", "amx_bf16"), "amx"),
    ],
)
def test_a_tier_has_all_that_is_below_it(
    undetected: pytest.MonkeyPatch, capabilities: tuple[str, ...], tier: CpuTier
):
    undetected.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, True))
    assert cpu_tier.detect_tier() == tier


def test_amx_that_the_system_withholds_is_not_there(undetected: pytest.MonkeyPatch):
    everything = (*AVX512, "avx512_bf16", "amx_tile", "amx_bf16")
    undetected.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(everything, True))
    undetected.setattr(torch.cpu, "_init_amx", lambda: False)
    assert cpu_tier.detect_tier() == "avx512_bf16"


def test_another_architecture_is_generic(undetected: pytest.MonkeyPatch):
    undetected.setattr(cpu_tier, "is_x86", lambda: False)
    assert cpu_tier.detect_tier() == "generic"


@pytest.mark.parametrize(("onednn", "bf16"), [(True, True), (True, False), (False, True)])
def test_another_architecture_computes_in_bf16_if_onednn_does(
    undetected: pytest.MonkeyPatch, onednn: bool, bf16: bool
):
    """Whose operators are not to be asked for where PyTorch was built without it."""
    operators = {"_is_mkldnn_bf16_supported": lambda: bf16} if onednn else {}
    undetected.setattr(cpu_tier, "is_x86", lambda: False)
    undetected.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    undetected.setattr(torch.ops, "mkldnn", SimpleNamespace(**operators))
    assert (host_dtypes()[0] == torch.bfloat16) == (onednn and bf16)


def test_the_variable_lowers_the_tier(tier: CpuTier):
    assert cpu_tier.cpu_tier() == tier
    dtypes = (torch.bfloat16, torch.float32)
    names = [each.name for each in kernel_registry.KERNELS if any(map(each.takes, dtypes))]
    assert names[:2] == ["rope", "paged_decode"]
    tiled = "tiled_linear" in names
    assert tiled == cpu_tier.has_tier("avx512")
    assert host_dtypes()[0] == (torch.bfloat16 if tiled else torch.float32)


def test_a_name_that_is_no_tier_is_refused():
    with (
        force_tier("avx1024"),  # type: ignore[arg-type]
        pytest.raises(ValueError, match="SPYRE_MM_CPU_TIER='avx1024' is none of generic, avx2"),
    ):
        cpu_tier.cpu_tier()


def test_a_tier_above_the_cpus_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_tier, "detect_tier", lambda: "avx2")
    with (
        force_tier("avx512"),
        pytest.raises(ValueError, match="SPYRE_MM_CPU_TIER=avx512: this CPU has avx2 at most"),
    ):
        cpu_tier.cpu_tier()


def test_inductor_compiles_for_the_tier(tier: CpuTier):
    """Not for the machine at hand: what is cached there runs wherever the tier does."""
    with cpu_tier.compiler_settings():
        if cpu_tier.takes_architecture():  # a release that cannot be told says so at the start
            assert config.cpp.march == cpu_tier.INSTRUCTIONS[tier].march
        assert pick_vec_isa().bit_width() in (0, cpu_tier.INSTRUCTIONS[tier].simdlen)


VARIANTS = [
    (kernel, name)
    for kernel in kernel_registry.KERNELS
    for name in CPU_TIERS[CPU_TIERS.index(kernel.tiers[0]) :]
]


@pytest.mark.parametrize(("kernel", "name"), VARIANTS, ids=lambda part: getattr(part, "name", part))
def test_each_kernel_compiles_for_each_of_its_tiers(kernel: Kernel, name: CpuTier, tmp_path: Path):
    """Also for those that this CPU lacks; a tier's flags admit no instruction above it."""
    bf16 = int(cpu_tier.INSTRUCTIONS[name].simdlen == 512)
    constants = {"HEAD_DIM": 64, "GROUP": 3, "KV_HEADS": 2, "BLOCK_SIZE": 64}
    defines = [f"-D{key}={value}" for key, value in constants.items()]
    file = tmp_path / f"{kernel.name}.cpp"
    file.write_text(kernel_source(kernel.name))
    instructions = cpu_tier.INSTRUCTIONS[name]
    command = ["g++", "-std=c++20", "-O1", "-fopenmp", "-fsyntax-only", *defines]
    command += [f"-DBF16={bf16}", f"-DBF16_PAIRS={bf16}", f"-march={instructions.march}"]
    subprocess.run([*command, *instructions.flags, str(file)], check=True)


OF_ANY_CPU = [kernel for kernel in kernel_registry.KERNELS if kernel.tiers[0] == "generic"]


@pytest.mark.parametrize("kernel", OF_ANY_CPU, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("bf16", [0, 1])
def test_a_kernel_for_any_cpu_reads_no_header_of_one_architecture(
    kernel: Kernel, bf16: int, tmp_path: Path
):
    """Below AVX-512, and so on Arm, z and Power: their compilers have no ``immintrin.h``."""
    file = tmp_path / f"{kernel.name}.cpp"
    file.write_text(kernel_source(kernel.name))
    constants = {"HEAD_DIM": 64, "GROUP": 3, "KV_HEADS": 2, "BLOCK_SIZE": 64}
    defines = [f"-D{key}={value}" for key, value in constants.items()]
    defines += [f"-DBF16={bf16}", "-DBF16_PAIRS=0"]
    command = ["g++", "-std=c++20", "-fopenmp", "-M", *defines, str(file)]
    read = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert any(Path(name).name == "cstring" for name in read)
    assert [name for name in read if Path(name).name.endswith("intrin.h")] == []

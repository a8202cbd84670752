# SPDX-License-Identifier: Apache-2.0
"""Compilation on the CPU: what the cache goes by is the same in every process."""

import os
import subprocess
import sys
from pathlib import Path

from torch._inductor.cpu_vec_isa import pick_vec_isa

KERNELS_THAT_NAME_THEIR_FLAGS = """
from torch._inductor.cpu_vec_isa import pick_vec_isa
from vllm_spyre_mm.model_executor.cpu.compile import cpu_compile_context

flags = []
kernels = [lambda: flags.append(pick_vec_isa().build_arch_flags()) for _ in range(8)]
with cpu_compile_context(kernels):
    pass
print(len(flags), *sorted(set(flags)), sep="\\n")
"""


def test_kernels_in_threads_are_compiled_for_the_same_instructions(tmp_path: Path):
    """Else a later start looks for them under another name; each process asks the machine anew."""
    finished = subprocess.run(
        [sys.executable, "-c", KERNELS_THAT_NAME_THEIR_FLAGS],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        timeout=100,
        check=True,
    )
    assert finished.stdout.splitlines() == ["8", pick_vec_isa().build_arch_flags()]

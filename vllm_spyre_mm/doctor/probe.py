# SPDX-License-Identifier: Apache-2.0
"""Examines native libraries and vLLM in a process of its own, which they may crash.

``python -m vllm_spyre_mm.doctor.probe NAME`` prints its findings as JSON, on its last line.
"""

import functools
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TIMEOUT = 300
"""Seconds that a probe may take; importing vLLM on a cold disk takes about a minute."""


class ProbeError(RuntimeError):
    """A probe's process failed; the message says why."""


@functools.cache
def probe(name: str) -> dict[str, Any]:
    """Run the probe ``name`` in a process of its own; returns its findings.

    Raises:
        ProbeError: its process ended with an error, or not in time.
    """
    # -P: a folder named like one of the packages in the current directory is not imported.
    command = [sys.executable, "-P", "-m", __name__, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise ProbeError(f"its process gave no answer within {TIMEOUT} s") from None
    if done.returncode:
        cause = _cause(done.stderr) or f"status {done.returncode}"
        raise ProbeError(f"its process ended with {cause}")
    return json.loads(done.stdout.splitlines()[-1])


def _cause(written: str) -> str:
    """The last line that names an error, else the last line; output at exit may follow an error."""
    lines = written.strip().splitlines()
    about_errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return next(iter(about_errors[-1:] or lines[-1:]), "")


def host() -> dict[str, Any]:
    """PyTorch's view of the host, and whether the C++ compiler makes what Inductor needs."""
    import torch
    from torch._inductor.cpp_builder import get_cpp_compiler

    from vllm_spyre_mm.model_executor.cpu.tier import computes_in_bf16, cpu_tier

    try:
        compiler, fault = get_cpp_compiler(), ""
        fault = _compile(compiler)
    except Exception as error:  # Inductor raises several classes of its own
        compiler, fault = "", str(error).strip().splitlines()[0]
    return {
        "bf16": computes_in_bf16(),
        "tier": cpu_tier(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "compiler": compiler,
        "compiler_fault": fault,
    }


PROGRAM = "#include <Python.h>\n#include <vector>\n#include <omp.h>\nint main() { return 0; }\n"
"""A program with the headers that Inductor's code includes."""


def _compile(compiler: str) -> str:
    """Compile a library like Inductor's; returns the first error, or an empty string."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "program.cpp")
        source.write_text(PROGRAM)
        include = sysconfig.get_paths()["include"]
        output = ["-o", str(source.with_suffix(".so"))]
        command = [compiler, "-shared", "-fPIC", "-fopenmp", f"-I{include}", str(source), *output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    return (errors or ["it failed without a message"])[0] if done.returncode else ""


def torchvision() -> dict[str, Any]:
    """Imports torchvision as the platform does."""
    from vllm_spyre_mm.compat import ensure_torchvision_importable

    ensure_torchvision_importable()
    import torch
    import torchvision.transforms.v2 as _  # noqa: F401 - what vLLM and Transformers use of it

    has_kernels = torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU")
    return {"operators": bool(has_kernels)}


def card() -> dict[str, Any]:
    """Imports the card's compiler as a worker does: after its variables are set."""
    import torch  # noqa: F401 - imports what registers itself as a device's backend

    from vllm_spyre_mm import config
    from vllm_spyre_mm.environment import export_card_environment, process_environment

    early = "torch_sendnn" in sys.modules
    export_card_environment(
        chunk_size=config.CARD_CHUNK_SIZE,
        context_len=config.DEFAULT_MAX_MODEL_LEN,
        max_num_seqs=config.DEFAULT_MAX_NUM_SEQS,
        max_batch_tkv=config.CARD_MAX_BATCH_TKV,
    )
    prepared = _compiler_limits(process_environment())
    import torch_sendnn

    return {
        "missing": [name for name in ("warmup_mode",) if not hasattr(torch_sendnn, name)],
        "early": early,
        "limits": prepared,
        "changed": _compiler_limits(process_environment()) != prepared,
    }


def _compiler_limits(environment: Mapping[str, str]) -> list[str]:
    """``NAME=value`` of what the card's compiler reads when it is imported."""
    return sorted(f"{n}={v}" for n, v in environment.items() if n.startswith("VLLM_DT_"))


def hooks() -> dict[str, Any]:
    """Loads the platform and adds the hooks, as each of vLLM's processes does; vLLM's view of the
    host's cores."""
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import available_cpu_count

    from vllm_spyre_mm import PLATFORM_CLASS, register_hooks

    cls = type(current_platform)
    platform = f"{cls.__module__}.{cls.__qualname__}"
    if platform == PLATFORM_CLASS:
        import vllm.engine.arg_utils
        import vllm.v1.engine.core  # noqa: F401 - the hooks on both act when they are loaded

        import vllm_spyre_mm.worker.worker  # noqa: F401
        from vllm_spyre_mm.scheduler.scheduler import SpyreScheduler

        register_hooks()
        from vllm_spyre_mm.frontend import processor_registration, renderer

        processor_registration.check_bases()
        renderer.check_base()
        SpyreScheduler.check_base()
    ours = platform == PLATFORM_CLASS
    return {"platform": platform, "ours": ours, "cores": available_cpu_count()}


PROBES: tuple[Callable[[], dict[str, Any]], ...] = (host, torchvision, card, hooks)

if __name__ == "__main__":
    print(json.dumps({each.__name__: each for each in PROBES}[sys.argv[1]]()))

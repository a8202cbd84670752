# SPDX-License-Identifier: Apache-2.0
"""Checks of the host: backend, compiler, instruction set, threads and memory."""

from collections.abc import Iterator

from vllm_spyre_mm.doctor.finding import Finding
from vllm_spyre_mm.doctor.probe import ProbeError, probe


def backend() -> Iterator[Finding]:
    """The backend that would run the decoder."""
    from vllm_spyre_mm.config import card_backend_available

    if not card_backend_available():
        said = "the CPU, compiled by inductor: torch_sendnn, the card's compiler, is not installed"
        yield Finding("backend", "ok", said)
        return
    anew = (
        "install the Spyre software anew, or take the CPU: additional_config "
        '\'{"backend": "inductor"}\''
    )
    try:
        found = probe("card")
    except ProbeError as error:
        said = f"torch_sendnn is installed and does not import: {error}"
        yield Finding("backend", "error", said, anew)
        return
    if found["missing"]:
        said = f"torch_sendnn is installed and lacks {', '.join(found['missing'])}"
        yield Finding("backend", "error", said, anew)
    elif found["early"]:
        yield Finding(
            "backend",
            "error",
            "torch_sendnn is imported with PyTorch, before the platform has set VLLM_DT_*",
            "set TORCH_DEVICE_BACKEND_AUTOLOAD=0",
        )
    elif len(found["limits"]) != 4 or found["changed"]:
        said = f"torch_sendnn does not keep its four VLLM_DT_*: {', '.join(found['limits'])}"
        yield Finding("backend", "error", said, "report it, with the version of torch_sendnn")
    else:
        yield Finding("backend", "ok", "the card: torch_sendnn imports, and sees VLLM_DT_*")


def compiler() -> Iterator[Finding]:
    """Whether the C++ compiler works, which compilation for the CPU needs."""
    found = probe("host")
    do = "install g++ and Python's headers, set CXX, or start with --enforce-eager, which is slower"
    if not found["compiler"]:
        yield Finding("compiler", "error", f"no C++ compiler: {found['compiler_fault']}", do)
    elif found["compiler_fault"]:
        said = f"{found['compiler']} cannot make a library: {found['compiler_fault']}"
        yield Finding("compiler", "error", said, do)
    else:
        yield Finding("compiler", "ok", f"{found['compiler']} makes what inductor needs")


def cpu() -> Iterator[Finding]:
    """The CPU's tier and dtypes."""
    found = probe("host")
    if found["bf16"]:
        said = f"kernels for {found['tier']}, bfloat16; PyTorch's vectors: {found['vectors']}"
        yield Finding("cpu", "ok", said)
    else:
        yield Finding(
            "cpu",
            "warning",
            f"kernels for {found['tier']}, no bfloat16: float32 is served, in twice the memory",
            "nothing, if SPYRE_MM_CPU_TIER is not set; a processor with AVX512_BF16 or AMX is "
            "several times as fast",
        )


def threads() -> Iterator[Finding]:
    """Whether there are as many threads as cores to run them."""
    cores, count = available_cores(), probe("host")["threads"]
    said = f"{count} threads for {cores} cores"
    if count > cores:
        do = f"set OMP_NUM_THREADS={cores}: threads that wait for a core stop all"
        yield Finding("threads", "warning", said, do)
    elif count <= cores / 2:
        do = "nothing if other programs need the rest; else unset OMP_NUM_THREADS"
        yield Finding("threads", "warning", said, do)
    else:
        yield Finding("threads", "ok", said)


def available_cores() -> int:
    """Logical CPUs that this process may use: its affinity, and a container's quota of them.

    Raises:
        ProbeError: vLLM, which counts them, does not load.
    """
    return int(probe("hooks")["cores"])


def memory() -> Iterator[Finding]:
    """Free memory of the host, or of the container's limit."""
    from vllm_spyre_mm.host_memory import host_memory

    found = host_memory()
    said = f"{gib(found.available)} of {gib(found.total)} GiB are free"
    if found.available < 4 << 30:
        do = "free memory: an engine's processes take about 3 GiB before any model"
        yield Finding("memory", "warning", said, do)
    else:
        yield Finding("memory", "ok", said)


def gib(size: int) -> str:
    """Bytes as GiB with one decimal."""
    return f"{size / 2**30:.1f}"

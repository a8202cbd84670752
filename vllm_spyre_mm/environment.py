# SPDX-License-Identifier: Apache-2.0
"""The one module that touches the environment: what is read of it, and what is set in it."""

import importlib.metadata
import os

from vllm_spyre_mm.config import CPU_TIERS, CpuTier
from vllm_spyre_mm.log import get_logger

logger = get_logger(__name__)


def prepare_process_environment() -> None:
    """Set what vLLM reads from the environment; runs in each process that loads the platform.

    Worker processes are spawned: a fork after OpenMP ran in the parent hangs for ever. The runner
    is the platform's own, so vLLM's scheduler must speak the protocol of its first model runner.
    """
    if os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "spawn") != "spawn":
        logger.warning(
            "VLLM_WORKER_MULTIPROC_METHOD=%s is replaced by spawn: a process that is forked after "
            "OpenMP ran hangs",
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"],
        )
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"


def process_environment() -> dict[str, str]:
    """A copy of this process's environment, for who reports about all of it."""
    return dict(os.environ)


def engine_runs_in_own_process() -> bool:
    """Whether vLLM starts the engine in a process of its own (its default)."""
    return os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") != "0"


def rust_frontend_requested() -> bool:
    """Whether vLLM's Rust front end is requested, which bypasses every Python hook."""
    return os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0")


def cpu_tier_limit() -> CpuTier | None:
    """The CPU tier that ``SPYRE_MM_CPU_TIER`` asks for, None without it.

    Like ``ATEN_CPU_CAPABILITY``, the variable applies to every process of the machine.

    Raises:
        ValueError: it names no tier.
    """
    name = os.environ.get("SPYRE_MM_CPU_TIER")
    if not name:
        return None
    if name not in CPU_TIERS:
        raise ValueError(f"SPYRE_MM_CPU_TIER={name!r} is none of {', '.join(CPU_TIERS)}")
    return name


def vllm_fixes_enabled() -> bool:
    """Whether faults of vLLM are mended (``vllm_spyre_mm.vllm_fixes``): ``SPYRE_MM_VLLM_FIXES``.

    A variable and not a setting: it is asked before an engine is configured, in every process.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get("SPYRE_MM_VLLM_FIXES") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"SPYRE_MM_VLLM_FIXES={value!r} is neither 0 nor 1")
    return value == "1"


def export_card_environment(
    *, chunk_size: int, context_len: int, max_num_seqs: int, max_batch_tkv: int
) -> None:
    """Set what ``torch_sendnn`` reads when it is imported; must run before that import.

    Args:
        chunk_size: tokens in a prefill chunk.
        context_len: longest sequence in tokens, with its padding.
        max_num_seqs: largest decode batch; the card's compiler wants at least 2.
        max_batch_tkv: bound on batch × padded length in tokens.
    """
    os.environ["VLLM_DT_CHUNK_LEN"] = str(chunk_size)
    os.environ["VLLM_DT_MAX_CONTEXT_LEN"] = str(context_len)
    os.environ["VLLM_DT_MAX_BATCH_SIZE"] = str(max(max_num_seqs, 2))
    os.environ["VLLM_DT_MAX_BATCH_TKV_LIMIT"] = str(max_batch_tkv)


def another_spyre_plugin_contends() -> bool:
    """Whether vLLM would find the platform of ``sendnn-inference`` beside this one."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "sendnn_inference" not in allowed.split(","):
        return False
    try:
        importlib.metadata.distribution("sendnn-inference")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def excluded_by_environment() -> tuple[str, str] | None:
    """What in the environment keeps vLLM from using this platform, and what to do; or None."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "spyre_mm" not in allowed.split(","):
        return f"VLLM_PLUGINS={allowed!r} does not name spyre_mm", "add it, or unset the variable"
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return "VLLM_TARGET_DEVICE=cpu makes vLLM take its own CPU platform", "unset the variable"
    return None


def warn_of_other_spyre_plugin() -> None:
    """Log what to do about ``sendnn-inference``, before vLLM refuses two platforms."""
    if not another_spyre_plugin_contends():
        return
    logger.error(
        "sendnn-inference and vllm-spyre-mm are installed side by side; each is a vLLM platform "
        "and vLLM runs one. Choose with VLLM_PLUGINS=spyre_mm or VLLM_PLUGINS=sendnn_inference, "
        "or uninstall one of them."
    )

# SPDX-License-Identifier: Apache-2.0
"""The one module that touches the environment: what is read of it, and what is set in it.

It is imported with the package, before PyTorch and vLLM may be, and imports neither.
"""

import importlib.metadata
import importlib.util
import itertools
import logging
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_spyre_mm.config import CpuTier

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's, which has handlers once it is loaded

TKV_LIMIT = "VLLM_DT_MAX_BATCH_TKV_LIMIT"
TKV_LIMIT_SET_HERE = "SPYRE_MM_BATCH_TKV_LIMIT"
"""Holds what the platform has set the limit to: any other value is the user's."""

THREAD_COUNTS = (
    "DT_PARALLEL_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
)
"""Threads of the card's compiler, which reads the first alone, and of what it calls."""

CARD = "AIU_WORLD_RANK_{}"
"""Name of the variable with the PCI address of a card, by the card's number from 0."""

HDMA_BYTES = {"FLEX_HDMA_P2PSIZE": 256 << 20, "FLEX_HDMA_COLLSIZE": 32 << 20}
"""Sizes of transfers between cards with which four of them are known to run."""


def keep_device_extensions_unloaded() -> None:
    """Keep PyTorch from loading ``torch_nnpa`` by itself, unless the user wants it.

    PyTorch imports such an extension when it is imported, and a collective on the host then fails.
    Spawned processes inherit the variable, and read it as they import PyTorch.
    """
    if importlib.util.find_spec("torch_nnpa") is not None:
        os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


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


def threads_set_by_vllm() -> bool:
    """Whether ``OMP_NUM_THREADS`` is vLLM's choice for its workers, and not the user's."""
    from vllm.utils.torch_utils import OMP_NUM_THREADS_SET_BY_VLLM

    return os.environ.get(OMP_NUM_THREADS_SET_BY_VLLM) == "1"


def cpu_tier_limit() -> "CpuTier | None":
    """The CPU tier that ``SPYRE_MM_CPU_TIER`` asks for, None without it.

    Like ``ATEN_CPU_CAPABILITY``, the variable applies to every process of the machine.

    Raises:
        ValueError: it names no tier.
    """
    from vllm_spyre_mm.config import CPU_TIERS

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


# -- the card's software: read when torch_sendnn is imported, set before -------------------------


def export_card_environment(
    *, chunk_size: int, context_len: int, max_num_seqs: int, max_batch_tkv: int
) -> None:
    """Set what the card's compiler has to know; must run before ``torch_sendnn`` is imported.

    The limits are set to these values whatever they were; what else is set stays as it is.

    Args:
        chunk_size: tokens in a prefill chunk.
        context_len: longest sequence in tokens that there are programs for.
        max_num_seqs: largest decode batch; the card's compiler wants at least 2.
        max_batch_tkv: bound on batch × padded length in tokens.
    """
    os.environ["VLLM_DT_CHUNK_LEN"] = str(chunk_size)
    os.environ["VLLM_DT_MAX_CONTEXT_LEN"] = str(context_len)
    os.environ["VLLM_DT_MAX_BATCH_SIZE"] = str(max(max_num_seqs, 2))
    os.environ[TKV_LIMIT] = os.environ[TKV_LIMIT_SET_HERE] = str(max_batch_tkv)
    os.environ.setdefault("COMPILATION_MODE", "offline_decoder")
    os.environ.setdefault("FLEX_OVERWRITE_NMB_FRAME", "true")


def cards_named() -> int:
    """How many cards the environment names, in ``AIU_WORLD_RANK_0`` and those after it."""
    return next(number for number in itertools.count() if CARD.format(number) not in os.environ)


def export_cards_of_engine(engine: int, world_size: int) -> None:
    """Name to the card's runtime the cards of one of several engines as if there were no others.

    Must run before ``torch_sendnn`` is imported, and once in a process.

    Args:
        engine: number of the engine on this host; those before it have the cards before its.
        world_size: its ranks, a card each.

    Raises:
        ValueError: ``SPYRE_DEVICES`` lists too few devices.
    """
    first, named = engine * world_size, cards_named()
    if listed := os.environ.get("SPYRE_DEVICES"):
        devices = listed.split(",")
        if len(devices) != named:
            raise ValueError(
                f"SPYRE_DEVICES lists {len(devices)} devices, and AIU_WORLD_RANK_n name {named} "
                "cards: which are whose cannot be said"
            )
        os.environ["SPYRE_DEVICES"] = ",".join(devices[first : first + world_size])
    own = [os.environ[CARD.format(first + rank)] for rank in range(world_size)]
    for number in range(named):
        del os.environ[CARD.format(number)]
    os.environ.update({CARD.format(rank): address for rank, address in enumerate(own)})
    os.environ["AIU_WORLD_SIZE"] = str(world_size)


def export_rank_environment(
    *, rank: int, world_size: int, num_threads: int, engine: int = 0
) -> None:
    """Set what the card's runtime has to know of a rank; must run before ``torch_sendnn`` is
    imported, once in a process. What the user has set stays as it is.

    Args:
        rank: of this process.
        world_size: ranks of the model, a card each.
        num_threads: that this rank may take of the host.
        engine: number of the engine on this host: its ranks meet so many ports after the first.

    Raises:
        ValueError: a variable says something else of this rank, or ``MASTER_PORT`` is no number.
    """
    if threads_set_by_vllm():
        del os.environ["OMP_NUM_THREADS"]
    for name in THREAD_COUNTS:
        os.environ.setdefault(name, str(num_threads))
    if world_size == 1:
        return
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
        if os.environ.setdefault(name, str(value)) != str(value):
            raise ValueError(
                f"{name}={os.environ[name]} is set in the environment of every rank, and this is "
                f"rank {rank} of {world_size}: unset it"
            )
    os.environ.setdefault("MASTER_ADDR", "localhost")
    given = os.environ.get("MASTER_PORT", "12355")  # the engines of a host inherit one
    if not given.isdecimal():
        raise ValueError(f"MASTER_PORT={given!r} is no number of a port: set one, or unset it")
    os.environ["MASTER_PORT"] = str(int(given) + engine)
    if world_size >= 4:  # collectives of four ranks exceed the defaults
        for name, size in HDMA_BYTES.items():
            os.environ.setdefault(name, str(size))


def encoder_environment(num_threads: int) -> dict[str, str]:
    """The environment of a process beside this one that encodes pictures.

    Args:
        num_threads: that it may take of the host.
    """
    threads = dict.fromkeys(THREAD_COUNTS, str(num_threads))
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)
    return {**os.environ, **threads, "PYTHONPATH": path}


def card_batch_tkv_limit() -> int | None:
    """The user's ``VLLM_DT_MAX_BATCH_TKV_LIMIT`` in tokens, None without it.

    Raises:
        ValueError: it is no positive integer.
    """
    given = os.environ.get(TKV_LIMIT)
    if given is None or given == os.environ.get(TKV_LIMIT_SET_HERE):
        return None
    if not given.isdecimal() or int(given) == 0:
        raise ValueError(f"VLLM_DT_MAX_BATCH_TKV_LIMIT={given!r} is no positive number of tokens")
    return int(given)


def runs_no_device(variables: Mapping[str, str]) -> bool:
    """Whether the card's runtime is told to run something else than a card."""
    stands_in = variables.get("FLEX_DEVICE") in ("MOCK", "COMPILE")
    return stands_in or variables.get("FLEX_COMPUTE") == "SENULATOR"


def card_mode_fault(variables: Mapping[str, str]) -> str | None:
    """Why the card's runtime would not run on a card, in words; None in an image for the card.

    Args:
        variables: of the environment, such as :func:`process_environment` gives.
    """
    compute, device = (variables.get(name) for name in ("FLEX_COMPUTE", "FLEX_DEVICE"))
    values = card_mode(variables)
    if device == "COMPILE":
        return f"programs are compiled and never run ({values})"
    if runs_no_device(variables):
        return f"a simulator, and no card ({values})"
    if not (compute and device):
        return f"{values}: the runtime may take a simulator without a word"
    if compute != "SENTIENT" or device not in ("PF", "VF", "VFIO"):
        return f"{values}, which no public image has"
    return None


def card_mode(variables: Mapping[str, str]) -> str:
    """What the card's runtime is told to run on, in words."""
    compute, device = (variables.get(name) for name in ("FLEX_COMPUTE", "FLEX_DEVICE"))
    return f"FLEX_COMPUTE is {compute or 'not set'}, FLEX_DEVICE {device or 'not set'}"

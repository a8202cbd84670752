# SPDX-License-Identifier: Apache-2.0
"""Variables of the card's software that are set against what the platform needs."""

import importlib.util
from collections.abc import Iterator

from vllm_spyre_mm.doctor.card import CardHost
from vllm_spyre_mm.doctor.finding import Finding, Level
from vllm_spyre_mm.environment import HDMA_BYTES, THREAD_COUNTS

Fault = tuple[Level, str, str]
"""How bad it is, what was found, and what to do."""

FROM_FLAGS = {
    "VLLM_DT_CHUNK_LEN": "--max-num-batched-tokens",
    "VLLM_DT_MAX_CONTEXT_LEN": "--max-model-len",
    "VLLM_DT_MAX_BATCH_SIZE": "--max-num-seqs",
}
"""What the platform sets anew, with the flag that it comes from."""


def variables(host: CardHost) -> Iterator[Finding]:
    """What is set, and what of it a start would stumble over."""
    faults = [
        *_faults_of_modes(host),
        *_faults_of_ranks(host),
        *_faults_of_limits(host),
        *_faults_of_threads(host),
    ]
    for level, said, do in faults:
        yield Finding("variables", level, said, do)
    if not faults:
        yield Finding("variables", "ok", "nothing is set against what the platform needs")


def _faults_of_modes(host: CardHost) -> Iterator[Fault]:
    compilation = host.variables.get("COMPILATION_MODE", "offline_decoder")
    if compilation != "offline_decoder":
        said = f"COMPILATION_MODE={compilation} is for other models than decoders"
        yield "error", said, "unset it"
    frame = host.variables.get("FLEX_OVERWRITE_NMB_FRAME", "true")
    if frame.lower() not in ("true", "1"):
        said = f"FLEX_OVERWRITE_NMB_FRAME={frame}: decoders are run with true"
        yield "warning", said, "unset it"
    if _is_on(host.variables.get("DISABLE_COMPILATION", "")):
        said = "DISABLE_COMPILATION is set: a graph that the cache lacks ends the start"
        yield "warning", said, "unset it, unless the cache was filled with the same limits"
    autoload = host.variables.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    if autoload != "0" and importlib.util.find_spec("torch_nnpa") is not None:
        said = f"torch_nnpa is installed and TORCH_DEVICE_BACKEND_AUTOLOAD is {autoload}"
        yield "error", f"{said}: workers die of it", "set it to 0"


def _faults_of_ranks(host: CardHost) -> Iterator[Fault]:
    stale = [name for name in ("RANK", "WORLD_SIZE") if name in host.variables]
    if stale:
        values = " and ".join(f"{name}={host.variables[name]}" for name in stale)
        said = f"{values} are set before the start: each worker has its own"
        yield "warning", said, f"unset {' and '.join(stale)}"
    if host.num_ranks < 4:
        return
    for name, known in HDMA_BYTES.items():
        given = host.variables.get(name)
        if given is not None and (_number(given) or 0) < known:
            said = f"{name}={given} is less than the {known} that four cards are known to run with"
            yield "warning", said, f"unset it, or set it to {known}"


def _faults_of_limits(host: CardHost) -> Iterator[Fault]:
    for name, flag in FROM_FLAGS.items():
        if name in host.variables:
            said = f"{name}={host.variables[name]} is set, and the platform sets it anew"
            yield "warning", said, f"unset it, and give {flag}"


def _faults_of_threads(host: CardHost) -> Iterator[Fault]:
    share = max(1, host.cores() // host.num_ranks)
    for name in THREAD_COUNTS:
        given = host.variables.get(name)
        if given is None:
            continue
        if _number(given) is None:
            yield "error", f"{name}={given!r} is no number", f"set it to {share}, or unset it"
        elif (_number(given) or 0) > share:
            said = f"{name}={given}, and each of {host.num_ranks} ranks has {share} cores"
            yield "warning", said, f"set it to {share}, or unset it"


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _is_on(text: str) -> bool:
    return text.lower() in ("1", "true", "yes", "on")

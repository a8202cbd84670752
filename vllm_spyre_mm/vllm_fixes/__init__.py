# SPDX-License-Identifier: Apache-2.0
"""Faults of vLLM that are mended here, a module each.

Each module says in ``FAULT`` what vLLM does by itself, and in ``REPLACED`` which attributes of
vLLM's are replaced to mend it; its ``install``, where it has one, does so. The others are called
by :mod:`vllm_spyre_mm.frontend`, from subclasses that vLLM's registries know.

``SPYRE_MM_VLLM_FIXES=0`` switches all of them off. It is a variable of the environment, since they
are installed before an engine is configured, in every process that loads vLLM's plugins.
"""

from vllm_spyre_mm.vllm_fixes.fault import Fault

__all__ = ["Fault", "install"]


def install() -> None:
    """Mend those that the installed vLLM has, as soon as the classes exist.

    Raises:
        UnsupportedVllmError: one of vLLM's classes is not as a fix expects.
        ValueError: ``SPYRE_MM_VLLM_FIXES`` is neither 0 nor 1.
    """
    from vllm_spyre_mm.vllm_fixes import (
        cleanup_without_accelerator,
        media,
        mistral_format,
        parent_watchdog,
        sender_cache,
        shutdown_errors,
        unsupported_operations,
    )

    for fix in (
        sender_cache,
        media,
        mistral_format,
        shutdown_errors,
        cleanup_without_accelerator,
        parent_watchdog,
        unsupported_operations,
    ):
        if fix.FAULT.applies():
            fix.install()

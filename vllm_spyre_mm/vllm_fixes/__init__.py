# SPDX-License-Identifier: Apache-2.0
"""Faults of vLLM that are mended here, a module each."""


def install() -> None:
    """Mend them, as soon as the classes exist.

    Raises:
        UnsupportedVllmError: one of vLLM's classes is not as a fix expects.
    """
    from vllm_spyre_mm.vllm_fixes import (
        array_pictures,
        chat_parts,
        cleanup_without_accelerator,
        media,
        mistral_format,
        parent_watchdog,
        sender_cache,
        shutdown_errors,
        unsupported_operations,
    )

    sender_cache.install()
    media.install()
    chat_parts.install()
    mistral_format.install()
    array_pictures.install()
    shutdown_errors.install()
    cleanup_without_accelerator.install()
    parent_watchdog.install()
    unsupported_operations.install()

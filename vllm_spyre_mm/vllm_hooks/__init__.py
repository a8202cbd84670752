# SPDX-License-Identifier: Apache-2.0
"""Everything that is added to vLLM's own classes.

Each module here adds one thing, says which upstream behaviour it leans on, and checks that it is
there (:mod:`.contract`); by a mark of its own it knows whether it is installed (:mod:`.marks`).
``engine_args`` acts when the platform is loaded, because the keyword has
to be known before vLLM's general plugins run; the rest is added by :func:`install`.
"""

import functools

from vllm_spyre_mm.vllm_hooks.contract import UnsupportedVllmError

__all__ = ["UnsupportedVllmError", "install"]


@functools.cache  # what succeeded; a failure is one again
def install() -> None:
    """Add the embedding to vLLM's outputs, and the checks to its inputs; once for each process.

    Raises:
        UnsupportedVllmError: one of vLLM's classes is not as the hooks expect. (The platform has
            checked the versions when it was loaded.)
    """
    from vllm_spyre_mm.vllm_hooks import (
        array_pictures,
        chat_parts,
        engine_output,
        input_processor,
        media,
        metrics,
        mistral_format,
        mixed_images,
        openai_api,
        orphans,
        output_processor,
        request_errors,
        sender_cache,
        server_end,
        shutdown,
        unasked,
        worker_operations,
    )

    engine_output.install()
    output_processor.install()
    input_processor.install()
    sender_cache.install()
    media.install()
    chat_parts.install()
    metrics.install()
    mistral_format.install()
    mixed_images.install()
    array_pictures.install()
    openai_api.install()
    request_errors.install()
    server_end.install()
    shutdown.install()
    orphans.install()
    unasked.install()
    worker_operations.install()

# SPDX-License-Identifier: Apache-2.0
"""Everything that is added to vLLM's own classes.

Each module adds one thing, says which upstream behaviour it leans on, and checks that it is there
(:mod:`vllm_spyre_mm.upstream.contract`); by a mark of its own it knows whether it is installed
(:mod:`vllm_spyre_mm.upstream.marks`). ``engine_args`` acts when the platform is loaded, because the
keyword has to be known before vLLM's general plugins run; the rest is added by :func:`install`.
"""

import functools

from vllm_spyre_mm import vllm_fixes


@functools.cache  # what succeeded; a failure is one again
def install() -> None:
    """Add the embedding to vLLM's outputs, and the checks to its inputs; once for each process.

    Raises:
        UnsupportedVllmError: one of vLLM's classes is not as the hooks expect. (The platform has
            checked the versions when it was loaded.)
    """
    from vllm_spyre_mm.frontend import (
        async_llm,
        engine_output,
        input_processor,
        metrics,
        output_processor,
        renderer_registration,
    )
    from vllm_spyre_mm.frontend.http import endpoint_plugin

    engine_output.install()
    output_processor.install()
    input_processor.install()
    metrics.install()
    renderer_registration.install()
    async_llm.install()
    endpoint_plugin.install()
    vllm_fixes.install()

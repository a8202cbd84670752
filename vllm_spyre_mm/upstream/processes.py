# SPDX-License-Identifier: Apache-2.0
"""Which process this is: one that vLLM started for an engine, or somebody's own."""

import multiprocessing

ENGINE_PROCESSES = ("EngineCore", "VllmWorker")
"""How vLLM names, for :mod:`multiprocessing`, the processes that it starts for an engine."""


def is_engine_process() -> bool:
    """Whether vLLM started this process for an engine.

    An engine may also run in the process of whoever made it (``VLLM_ENABLE_V1_MULTIPROCESSING=0``);
    nothing that concerns the whole process is changed there.
    """
    process = multiprocessing.current_process()
    return multiprocessing.parent_process() is not None and process.name.startswith(
        ENGINE_PROCESSES
    )

# SPDX-License-Identifier: Apache-2.0
"""Lets the engine's process end without a traceback on a machine that has no accelerator.

Leans on: ``vllm.v1.engine.core`` calls ``cleanup_dist_env_and_memory`` by the name it imported.
"""

import gc
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded
from vllm_spyre_mm.vllm_fixes.fault import Fault

FAULT = Fault(
    "vLLM empties the cache of the accelerator when an engine ends, on every platform but its own "
    "for CPUs, and PyTorch raises where there is no accelerator.",
    seen_in="0.32.0",
)
REPLACED = ("vllm.v1.engine.core.cleanup_dist_env_and_memory",)


def install() -> None:
    """Replace the clean-up of the engine's process as soon as it is loaded."""
    when_loaded("vllm.v1.engine.core", _clean_up_host_only)


def _clean_up_host_only(module: ModuleType) -> None:
    require_attributes(module, ("cleanup_dist_env_and_memory",))
    original = module.cleanup_dist_env_and_memory
    if is_extended(original, __name__):
        return
    require_parameters(original, ("shutdown_ray",))
    module.cleanup_dist_env_and_memory = _leaving_accelerators_out(original)  # type: ignore[attr-defined]


def _leaving_accelerators_out(original: Callable[..., None]) -> Callable[..., None]:
    @extending(original, __name__)
    def clean_up(*args: Any, **kwargs: Any) -> None:
        if torch.accelerator.is_available():
            original(*args, **kwargs)
        else:
            clean_up_host()

    return clean_up


def clean_up_host() -> None:
    """Leave the process groups and free memory; what vLLM does, without the accelerator's part."""
    from vllm import envs
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    envs.disable_envs_cache()
    destroy_model_parallel()
    destroy_distributed_environment()
    gc.collect()

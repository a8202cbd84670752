# SPDX-License-Identifier: Apache-2.0
"""Lets the engine's process end without a traceback on a machine that has no accelerator.

Leans on: ``vllm.v1.engine.core`` calls ``cleanup_dist_env_and_memory`` by the name it imported.
That function empties the accelerator's cache on every platform that is not vLLM's own CPU, and
PyTorch raises where there is no accelerator.
"""

import gc
from types import ModuleType

from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.module_loading import when_loaded


def install() -> None:
    """Replace the clean-up of the engine's process as soon as it is loaded."""
    when_loaded("vllm.v1.engine.core", _clean_up_host_only)


def _clean_up_host_only(module: ModuleType) -> None:
    require_attributes(module, ("cleanup_dist_env_and_memory",))
    require_parameters(module.cleanup_dist_env_and_memory, ("shutdown_ray",))
    module.cleanup_dist_env_and_memory = clean_up  # type: ignore[attr-defined]


def clean_up(shutdown_ray: bool = False) -> None:
    """Leave the process groups and free memory; what vLLM does, without the accelerator's part."""
    from vllm import envs
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    assert not shutdown_ray, "the platform runs without Ray"
    envs.disable_envs_cache()
    destroy_model_parallel()
    destroy_distributed_environment()
    gc.collect()

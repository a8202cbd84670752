# SPDX-License-Identifier: Apache-2.0
"""What each data-parallel engine of a host has of it, said before any of them starts.

The engines of a dense model know nothing of each other: each would take all of the host. Their
cores are divided by ``worker.host_share``, in the process of each.
"""

from typing import TYPE_CHECKING

from vllm.utils.torch_utils import available_cpu_count

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.environment import cards_named
from vllm_spyre_mm.host_cores import usable_cores
from vllm_spyre_mm.host_memory import host_memory

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def divide_host(vllm_config: "VllmConfig", settings: SpyreSettings) -> SpyreSettings:
    """Settings that say how many engines share this host, and the memory of each.

    Memory is measured here, once: each engine would count what others have loaded already.

    Raises:
        ValueError: there are fewer cores or cards than the engines need.
    """
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size == 1 or parallel.data_parallel_size_local < 2:
        return settings
    num_engines = parallel.data_parallel_size_local
    num_cores = min(len(usable_cores()), available_cpu_count())
    if num_cores < num_engines:
        raise ValueError(
            f"data-parallel-size-local={num_engines} is more than the cores that may be used here "
            f"({num_cores}): lower it, or start the others on other hosts with --headless"
        )
    if settings.backend == "sendnn":
        _check_cards(num_engines, parallel.world_size)
    share = host_memory().free(vllm_config.cache_config.gpu_memory_utilization) // num_engines
    return settings.model_copy(
        update={"num_local_engines": num_engines, "engine_memory_bytes": share}
    )


def _check_cards(num_engines: int, cards_each: int) -> None:
    named = cards_named()
    if named < num_engines * cards_each:
        raise ValueError(
            f"{num_engines} engines of {cards_each} cards each need {num_engines * cards_each}, "
            f"and the environment names {named} of them, in AIU_WORLD_RANK_0 and those after it"
        )

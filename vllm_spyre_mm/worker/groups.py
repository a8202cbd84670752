# SPDX-License-Identifier: Apache-2.0
"""The process groups of a model's ranks."""

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import ProcessGroup
from vllm.utils.torch_utils import available_cpu_count

from vllm_spyre_mm.worker.ranks import Ranks

if TYPE_CHECKING:
    from vllm.config import ParallelConfig


def join_process_group(
    config: "ParallelConfig", rank: int, local_rank: int, init_method: str, backend: str
) -> None:
    """Join the other ranks, and set vLLM's groups up.

    Args:
        config: of the engine.
        rank: of this process.
        local_rank: the same, on this host.
        init_method: how the ranks find each other, as PyTorch takes it.
        backend: of the groups.
    """
    # vLLM's GPU worker has a function for this, but its module imports what only GPUs need.
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    seconds = config.distributed_timeout_seconds
    timeout = None if seconds is None else timedelta(seconds=seconds)
    init_distributed_environment(config.world_size, rank, init_method, local_rank, backend, timeout)
    ensure_model_parallel_initialized(config.tensor_parallel_size, 1)


def register_default_group() -> ProcessGroup:
    """Every rank's group, under the name by which the card's software looks for it."""
    from torch._C._distributed_c10d import _register_process_group

    world = torch.distributed.group.WORLD
    assert world is not None, "joined before"
    name: Any = "default"  # PyTorch's type of such names is its own
    _register_process_group(name, world)
    return world


def decoder_group(world_size: int, for_card: bool) -> ProcessGroup | None:
    """What the decoder's collectives run over; None for one rank."""
    if world_size == 1:
        return None
    if for_card:
        return register_default_group()
    from vllm.distributed import get_tp_group

    return get_tp_group().device_group


def all_threads(world_size: int) -> int:
    """Threads of all ranks, each of which has its share (vLLM sets it, unless the user has)."""
    return min(world_size * torch.get_num_threads(), available_cpu_count())


def host_ranks(world_size: int) -> Ranks:
    """What the runner shares pictures and tokens over."""
    if world_size == 1:
        return Ranks()
    from vllm.distributed import get_tp_group

    return Ranks(get_tp_group().cpu_group, all_threads(world_size))

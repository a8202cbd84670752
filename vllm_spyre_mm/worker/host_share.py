# SPDX-License-Identifier: Apache-2.0
"""What a worker takes of its host: its order of bytes, and an engine's cores, threads and cards."""

import sys
from collections.abc import Sequence

import torch
from vllm.utils.torch_utils import available_cpu_count

from vllm_spyre_mm.environment import export_cards_of_engine, threads_set_by_vllm
from vllm_spyre_mm.host_cores import Core, bind_to, in_words, share_of_cores, usable_cores
from vllm_spyre_mm.log import get_logger

logger = get_logger(__name__)


def take_share(*, engine: int, num_engines: int, rank: int, world_size: int, card: bool) -> None:
    """Bind this process to its engine's cores, and name it its engine's cards.

    The ranks of an engine share its cores, and each has its part of their threads: one for each
    core, or what the user has set. Neither is more than the engine's logical CPUs, nor than its
    part of a container's quota of them. To be called once, before anything of the card's software
    is imported.

    Args:
        engine: number of the engine on this host, from 0.
        num_engines: that share the host.
        rank: of this process in its engine.
        world_size: ranks of an engine.
        card: whether each of them has a card.

    Raises:
        ValueError: the environment does not tell one engine's cards from another's.
    """
    usable, available = usable_cores(), available_cpu_count()  # before this process is bound
    cores = share_of_cores(usable, engine, num_engines)
    bind_to(cores)
    # Of a container's quota as much as of the CPUs: all of its own where there is none.
    limit = available * _num_cpus(cores) // _num_cpus(usable)
    wanted = len(cores) if threads_set_by_vllm() else world_size * torch.get_num_threads()
    of_rank = max(1, min(wanted, limit) // world_size)
    torch.set_num_threads(of_rank)
    if card:
        export_cards_of_engine(engine, world_size)
    if rank == 0:
        what, threads = in_words(cores), of_rank * world_size
        said = "Engine %d of the %d on this host runs on %s (threads: %d)"
        logger.info(said, engine, num_engines, what, threads)


def _num_cpus(cores: Sequence[Core]) -> int:
    return sum(len(core.cpus) for core in cores)


def read_little_endian() -> None:
    """Have PyTorch read files that do not say their order of bytes as other hosts write them."""
    if sys.byteorder == "big":
        torch.serialization.set_default_load_endianness(torch.serialization.LoadEndianness.LITTLE)

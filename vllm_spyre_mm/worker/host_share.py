# SPDX-License-Identifier: Apache-2.0
"""What a worker takes of its host: its order of bytes, and an engine's cores, threads and cards."""

import sys

import torch

from vllm_spyre_mm.environment import export_cards_of_engine
from vllm_spyre_mm.host_cores import bind_to, in_words, share_of_cores, usable_cores
from vllm_spyre_mm.log import get_logger

logger = get_logger(__name__)


def take_share(*, engine: int, num_engines: int, rank: int, world_size: int, card: bool) -> None:
    """Bind this process to its engine's cores, and name it its engine's cards.

    The ranks of an engine share its cores, and each has its part of their threads. To be called
    once, before anything of the card's software is imported.

    Args:
        engine: number of the engine on this host, from 0.
        num_engines: that share the host.
        rank: of this process in its engine.
        world_size: ranks of an engine.
        card: whether each of them has a card.

    Raises:
        ValueError: the environment does not tell one engine's cards from another's.
    """
    cores = share_of_cores(usable_cores(), engine, num_engines)
    bind_to(cores)
    num_cpus = sum(len(core.cpus) for core in cores)
    torch.set_num_threads(max(1, min(torch.get_num_threads(), num_cpus // world_size)))
    if card:
        export_cards_of_engine(engine, world_size)
    if rank == 0:
        what = in_words(cores)
        logger.info("Engine %d of the %d on this host runs on %s", engine, num_engines, what)


def read_little_endian() -> None:
    """Have PyTorch read files that do not say their order of bytes as other hosts write them."""
    if sys.byteorder == "big":
        torch.serialization.set_default_load_endianness(torch.serialization.LoadEndianness.LITTLE)

# SPDX-License-Identifier: Apache-2.0
"""The cores that this process may use, and how several engines of one host share them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

THREADS = Path("/proc/self/task")
"""Has a folder for each thread of this process."""

CPUS = Path("/sys/devices/system/cpu")
"""Has a folder for each logical CPU, with its node and the CPUs of its core."""


@dataclass(frozen=True, slots=True, order=True)
class Core:
    """A physical core.

    Attributes:
        node: number of its NUMA node.
        cpus: numbers of its logical CPUs that may be used, ascending.
    """

    node: int
    cpus: tuple[int, ...]


def usable_cores() -> list[Core]:
    """The physical cores of which this process may use a logical CPU, node by node."""
    siblings: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings.setdefault(_core_of(cpu), []).append(cpu)
    return sorted(Core(_node_of(cpus[0]), tuple(cpus)) for cpus in siblings.values())


def _core_of(cpu: int) -> str:
    """The list of the logical CPUs that share a core with one, itself where nothing is known."""
    file = CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    return file.read_text().strip() if file.exists() else str(cpu)


def _node_of(cpu: int) -> int:
    """The NUMA node of a logical CPU, 0 where the system has none."""
    nodes = (CPUS / f"cpu{cpu}").glob("node[0-9]*")
    return min((int(node.name.removeprefix("node")) for node in nodes), default=0)


def share_of_cores(cores: Sequence[Core], engine: int, num_engines: int) -> list[Core]:
    """What one of several engines has of the cores: neighbours, as many as each other engine.

    Where nodes have equally many cores, an engine has whole nodes if the number of engines divides
    that of the nodes, and lies within one if it is a multiple. Where they have not, equal shares
    come first, and an engine may have cores of two nodes.

    Args:
        cores: in the order of their nodes, at least one for each engine.
        engine: whose share, from 0.
        num_engines: that share the cores; their numbers of cores differ by one at most.
    """
    first, end = (len(cores) * each // num_engines for each in (engine, engine + 1))
    return list(cores[first:end])


def bind_to(cores: Sequence[Core]) -> None:
    """Keep every thread of this process, and those that they start, on these cores.

    The system then takes memory that they write first from the nodes of these cores.
    """
    cpus = {cpu for core in cores for cpu in core.cpus}
    for thread in THREADS.iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cpus)
        except ProcessLookupError:
            continue  # it has ended


def in_words(cores: Sequence[Core]) -> str:
    """Such as ``8 cores (CPUs 0-7,16-23) of NUMA node 0``."""
    nodes = sorted({core.node for core in cores})
    cpus = _ranges(sorted(cpu for core in cores for cpu in core.cpus))
    counted, named = ("core" if len(cores) == 1 else "cores"), ("s" if len(nodes) > 1 else "")
    return f"{len(cores)} {counted} (CPUs {cpus}) of NUMA node{named} {_ranges(nodes)}"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, as the system writes them: ``0-3,8``."""
    runs = (
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    )
    return ",".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs)

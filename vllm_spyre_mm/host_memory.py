# SPDX-License-Identifier: Apache-2.0
"""The memory that this process may use: the host's, or what a container has of it."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

NODES = Path("/sys/devices/system/node")
CGROUP = Path("/sys/fs/cgroup")

NODE_RECLAIMABLE = ("Inactive(file)", "Active(file)", "SReclaimable")
GROUP_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")
"""What counts as used and goes when memory is needed: files that were read, a checkpoint for one,
and caches of the kernel. As a NUMA node's ``meminfo`` and a group's ``memory.stat`` name them."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory in bytes.

    Attributes:
        total: of all NUMA nodes that this process may use, or a container's limit if that is less.
        available: what is free of it, or is given back when it is needed.
    """

    total: int
    available: int

    @property
    def taken(self) -> int:
        """By all processes."""
        return self.total - self.available

    def free(self, utilization: float) -> int:
        """What is left of a share of the total; negative where more is taken.

        Args:
            utilization: the share, ``--gpu-memory-utilization``.
        """
        return int(self.total * utilization) - self.taken


def host_memory() -> HostMemory:
    """The memory as it is now."""
    from vllm.utils.cpu_resource_utils import get_cgroup_memory_limit, get_cgroup_memory_usage

    memory = _memory_of_nodes()
    limit, usage = get_cgroup_memory_limit(), get_cgroup_memory_usage()
    if limit is None:
        return memory
    left = limit - (usage or 0) + _reclaimable_of_group()
    total = min(memory.total, limit)
    return HostMemory(total, max(0, min(total, memory.available, left)))


def _memory_of_nodes() -> HostMemory:
    """All of the host's memory, or that of the NUMA nodes which the process is kept to."""
    import psutil
    from vllm.utils.cpu_resource_utils import get_visible_memory_node

    present = {int(node.name.removeprefix("node")): node for node in NODES.glob("node[0-9]*")}
    visible = present.keys() & set(get_visible_memory_node())
    if not visible or visible == present.keys():
        host = psutil.virtual_memory()
        return HostMemory(host.total, host.available)
    nodes = [_memory_of_node(present[number]) for number in visible]
    return HostMemory(sum(each.total for each in nodes), sum(each.available for each in nodes))


def _memory_of_node(node: Path) -> HostMemory:
    # A line of it: "Node 0 MemTotal:  97421888 kB".
    lines = (line.split() for line in (node / "meminfo").read_text().splitlines())
    sizes = {fields[2].rstrip(":"): int(fields[3]) << 10 for fields in lines}
    reclaimable = sum(sizes[name] for name in NODE_RECLAIMABLE)
    return HostMemory(sizes["MemTotal"], sizes["MemFree"] + reclaimable)


def _reclaimable_of_group() -> int:
    files = (CGROUP / "memory.stat", CGROUP / "memory" / "memory.stat")
    file = next((each for each in files if each.exists()), None)
    if file is None:
        return 0
    sizes = {name: int(size) for name, size in map(str.split, file.read_text().splitlines())}
    # The first version of control groups has sums with the groups inside under names of their own.
    return sum(sizes.get(f"total_{name}", sizes.get(name, 0)) for name in GROUP_RECLAIMABLE)


def return_free_memory() -> None:
    """Give the operating system what is free; glibc would keep it.

    For the moments after a great deal was needed once: replaced weights, a compilation.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

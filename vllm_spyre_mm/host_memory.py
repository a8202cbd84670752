# SPDX-License-Identifier: Apache-2.0
"""The memory that this process may use: the host's, or what a container has of it."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

NODES = Path("/sys/devices/system/node")
CGROUP = Path("/sys/fs/cgroup")

NODE_RECLAIMABLE = ("Inactive(file)", "Active(file)", "SReclaimable")
CGROUP_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")
"""Memory that counts as used but is reclaimed on demand: the page cache, with a checkpoint that was
read, and slab caches; names of a NUMA node's ``meminfo`` and of a cgroup's ``memory.stat``."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory in bytes.

    Attributes:
        total: memory of all NUMA nodes that this process may use, or a container's limit if less.
        available: the part of it that is free or can be reclaimed.
    """

    total: int
    available: int

    @property
    def taken(self) -> int:
        """Bytes that all processes use."""
        return self.total - self.available

    def free(self, utilization: float) -> int:
        """Bytes left of a share of the total; negative where more is taken.

        Args:
            utilization: the share, ``--gpu-memory-utilization``.
        """
        return int(self.total * utilization) - self.taken


def host_memory() -> HostMemory:
    """Total and available memory at this moment."""
    from vllm.utils.cpu_resource_utils import get_cgroup_memory_limit, get_cgroup_memory_usage

    memory = _memory_of_nodes()
    limit, usage = get_cgroup_memory_limit(), get_cgroup_memory_usage()
    if limit is None:
        return memory
    left = limit - (usage or 0) + _reclaimable_of_cgroup()
    total = min(memory.total, limit)
    return HostMemory(total, max(0, min(total, memory.available, left)))


def _memory_of_nodes() -> HostMemory:
    """Memory of the host, or of the NUMA nodes that the process is bound to."""
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
    # A line of the file: "Node 0 MemTotal:  97421888 kB".
    lines = (line.split() for line in (node / "meminfo").read_text().splitlines())
    sizes = {fields[2].rstrip(":"): int(fields[3]) << 10 for fields in lines}
    reclaimable = sum(sizes[name] for name in NODE_RECLAIMABLE)
    return HostMemory(sizes["MemTotal"], sizes["MemFree"] + reclaimable)


def _reclaimable_of_cgroup() -> int:
    files = (CGROUP / "memory.stat", CGROUP / "memory" / "memory.stat")
    file = next((each for each in files if each.exists()), None)
    if file is None:
        return 0
    sizes = {name: int(size) for name, size in map(str.split, file.read_text().splitlines())}
    # In cgroup v1 the sums over child groups have names that start with "total_".
    return sum(sizes.get(f"total_{name}", sizes.get(name, 0)) for name in CGROUP_RECLAIMABLE)


def process_memory() -> int:
    """Bytes that this process has to itself: not those of files, which others may share."""
    import psutil

    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def return_free_memory() -> None:
    """Return free heap memory to the operating system (``malloc_trim``); glibc would keep it.

    Called after peaks that do not come again: replaced weights, a compilation.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

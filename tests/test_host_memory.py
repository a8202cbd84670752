# SPDX-License-Identifier: Apache-2.0
"""The memory of all NUMA nodes, of those that the process may use, or of its container."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from vllm.utils import cpu_resource_utils

from vllm_spyre_mm import host_memory
from vllm_spyre_mm.host_memory import HostMemory
from vllm_spyre_mm.platform import SpyrePlatform

GIB = 1 << 30
MEMINFO = """\
Node {number} MemTotal:       {total} kB
Node {number} MemFree:        {free} kB
Node {number} Active(file):   1048576 kB
Node {number} Inactive(file): 1048576 kB
Node {number} SReclaimable:   0 kB
Node {number} HugePages_Total: 0
"""


class Host:
    """A host as the kernel describes it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        patch.setattr(host_memory, "NODES", folder / "node")
        patch.setattr(host_memory, "CGROUP", folder)
        self.nodes([])
        self.container(None)

    def nodes(self, sizes: list[int], visible: list[int] | None = None) -> None:
        """NUMA nodes of so many GiB, a quarter of each free."""
        for number, size in enumerate(sizes):
            node = self.folder / "node" / f"node{number}"
            node.mkdir(parents=True)
            text = MEMINFO.format(number=number, total=size << 20, free=size << 18)
            (node / "meminfo").write_text(text)
        whole = SimpleNamespace(total=sum(sizes) * GIB, available=sum(sizes) * GIB // 2)
        self.patch.setattr(psutil, "virtual_memory", lambda: whole)
        seen = list(range(len(sizes))) if visible is None else visible
        self.patch.setattr(cpu_resource_utils, "get_visible_memory_node", lambda: seen)

    def container(self, limit: int | None, usage: int = 0) -> None:
        """A control group with a limit, in GiB."""
        limit_bytes = None if limit is None else limit * GIB
        patch = self.patch.setattr
        patch(cpu_resource_utils, "get_cgroup_memory_limit", lambda: limit_bytes)
        patch(cpu_resource_utils, "get_cgroup_memory_usage", lambda: usage * GIB)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def found() -> tuple[float, float]:
    memory = host_memory.host_memory()
    return memory.total / GIB, memory.available / GIB


@pytest.mark.parametrize("visible", [None, [0, 1], [1, 0, 2, 3], []])
def test_all_sockets_count(host: Host, visible: list[int] | None) -> None:
    """vLLM may name nodes that are not there, and none where it does not know."""
    host.nodes([256, 128], visible)
    assert found() == (384, 192)
    assert SpyrePlatform.get_device_total_memory() == 384 * GIB


def test_a_host_that_says_nothing_of_nodes(host: Host) -> None:
    host.nodes([])
    whole = SimpleNamespace(total=16 * GIB, available=4 * GIB)
    host.patch.setattr(psutil, "virtual_memory", lambda: whole)
    assert found() == (16, 4)


@pytest.mark.parametrize(
    ("visible", "expected"), [([0], (256, 66)), ([1], (128, 34)), ([0, 2], (320, 84))]
)
def test_nodes_that_the_process_is_kept_to(
    host: Host, visible: list[int], expected: tuple[int, int]
) -> None:
    """Free, and two GiB of files on each."""
    host.nodes([256, 128, 64], visible)
    assert found() == expected


@pytest.mark.parametrize("visible", [None, [1]])
def test_a_containers_limit(host: Host, visible: list[int] | None) -> None:
    host.nodes([256, 128], visible)
    host.container(64, usage=40)
    assert found() == (64, 24)
    host.container(64, usage=70)
    assert found() == (64, 0)
    host.container(4096, usage=1)
    assert found() == ((384, 192) if visible is None else (128, 34))


def test_less_is_free_on_the_host_than_the_container_may_have(host: Host) -> None:
    host.nodes([40])
    host.container(36, usage=2)
    assert found() == (36, 20)


@pytest.mark.parametrize(
    ("file", "stat"),
    [
        ("memory.stat", "anon 7\ninactive_file {size}\nactive_file {size}\nslab_reclaimable 0\n"),
        (
            "memory/memory.stat",
            "inactive_file 5\ntotal_inactive_file {size}\ntotal_active_file {size}\n",
        ),
    ],
)
def test_files_that_a_container_read_are_free(host: Host, file: str, stat: str) -> None:
    """Its own checkpoint would otherwise leave no memory for the KV cache."""
    (host.folder / file).parent.mkdir(exist_ok=True)
    (host.folder / file).write_text(stat.format(size=10 * GIB))
    host.nodes([256])
    host.container(64, usage=50)
    assert found() == (64, 34)


def test_what_is_left_of_a_share() -> None:
    assert HostMemory(16, 6).taken == 10
    assert HostMemory(16, 6).free(0.75) == 2
    assert HostMemory(16, 6).free(0.5) == -2


def test_this_host() -> None:
    memory = host_memory.host_memory()
    assert 0 < memory.available <= memory.total <= psutil.virtual_memory().total

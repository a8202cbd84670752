# SPDX-License-Identifier: Apache-2.0
"""Engines of one host have cores of their own: whole nodes, where they are equal and it divides."""

import os
from pathlib import Path

import pytest

from vllm_spyre_mm import host_cores
from vllm_spyre_mm.host_cores import Core, in_words, share_of_cores, usable_cores


def host(folder: Path, nodes: int, cores: int, threads: int) -> None:
    """A host as the kernel describes it: a core's second thread is numbered after all the first."""
    count = nodes * cores
    for cpu in range(count * threads):
        siblings = [cpu % count + count * thread for thread in range(threads)]
        topology = folder / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(",".join(map(str, siblings)) + "\n")
        (folder / f"cpu{cpu}" / f"node{cpu % count // cores}").mkdir()


@pytest.fixture
def cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_cores, "CPUS", tmp_path)
    return tmp_path


def allow(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(numbers))


def test_the_threads_of_a_core_are_one_core(cpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host(cpus, nodes=2, cores=2, threads=2)
    allow(monkeypatch, *range(8))
    assert usable_cores() == [Core(0, (0, 4)), Core(0, (1, 5)), Core(1, (2, 6)), Core(1, (3, 7))]
    allow(monkeypatch, 7, 3, 5)
    assert usable_cores() == [Core(0, (5,)), Core(1, (3, 7))]


def test_a_system_that_says_nothing_has_cores_of_one_thread(
    cpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, 1, 0)
    assert usable_cores() == [Core(0, (0,)), Core(0, (1,))]


@pytest.mark.parametrize("num_engines", [2, 4])
def test_engines_have_whole_nodes_where_that_divides(num_engines: int) -> None:
    cores = [Core(node, (4 * node + each,)) for node in range(4) for each in range(4)]
    for engine in range(num_engines):
        share = share_of_cores(cores, engine, num_engines)
        nodes = {core.node for core in share}
        assert share == [core for core in cores if core.node in nodes]
        assert len(nodes) == 4 // num_engines


def test_engines_lie_within_a_node_where_they_are_a_multiple() -> None:
    cores = [Core(node, (4 * node + each,)) for node in range(2) for each in range(4)]
    shares = [share_of_cores(cores, engine, 4) for engine in range(4)]
    assert [{core.node for core in share} for share in shares] == [{0}, {0}, {1}, {1}]


def test_equal_shares_come_before_whole_nodes() -> None:
    """A container may leave 3 cores of one node and 5 of another."""
    cores = [Core(int(number > 2), (number,)) for number in range(8)]
    shares = [share_of_cores(cores, engine, 2) for engine in range(2)]
    assert [[core.node for core in share] for share in shares] == [[0, 0, 0, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize(("num_cores", "num_engines"), [(7, 3), (2, 2), (8, 5), (9, 1)])
def test_every_core_is_one_engines(num_cores: int, num_engines: int) -> None:
    cores = [Core(0, (number,)) for number in range(num_cores)]
    shares = [share_of_cores(cores, engine, num_engines) for engine in range(num_engines)]
    assert [core for share in shares for core in share] == cores
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(shares)


@pytest.mark.parametrize(
    ("cores", "words"),
    [
        ([Core(0, (3,))], "1 core (CPUs 3) of NUMA node 0"),
        ([Core(1, (0, 8)), Core(1, (1, 9))], "2 cores (CPUs 0-1,8-9) of NUMA node 1"),
        ([Core(0, (0,)), Core(1, (5,))], "2 cores (CPUs 0,5) of NUMA nodes 0-1"),
    ],
)
def test_a_share_in_words(cores: list[Core], words: str) -> None:
    assert in_words(cores) == words

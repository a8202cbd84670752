# SPDX-License-Identifier: Apache-2.0
"""What a process takes of its host as its engine's part: cores, threads and cards."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from vllm_spyre_mm.host_cores import Core
from vllm_spyre_mm.worker import host_share
from vllm_spyre_mm.worker.host_share import take_share

TAKE = """
import json, os, sys, threading
from vllm_spyre_mm.worker.host_share import take_share

ended = threading.Event()
thread = threading.Thread(target=ended.wait)  # one that was there before
thread.start()
take_share(**json.loads(sys.argv[1]))
print(json.dumps({
    "cpus": [sorted(os.sched_getaffinity(int(name))) for name in os.listdir("/proc/self/task")],
    "cards": {name: os.environ[name] for name in sorted(os.environ) if "AIU" in name},
}))
ended.set()
"""
CARDS = {f"AIU_WORLD_RANK_{number}": f"card {number}" for number in range(4)}


def taken(**arguments: Any) -> Any:
    """What a process of its own has after it took its share: that cannot be undone."""
    finished = subprocess.run(
        [sys.executable, "-c", TAKE, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | CARDS,
    )
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize(("world_size", "card"), [(1, False), (2, True)])
def test_two_engines_share_nothing(world_size: int, card: bool) -> None:
    first, second = (
        taken(engine=engine, num_engines=2, rank=0, world_size=world_size, card=card)
        for engine in range(2)
    )
    for found in (first, second):
        cpus, *others = found["cpus"]
        assert others
        assert all(each == cpus for each in others)
    assert not set(first["cpus"][0]) & set(second["cpus"][0])
    if not card:
        assert first["cards"] == second["cards"] == CARDS
        return
    for number, found in enumerate((first, second)):
        assert found["cards"] == {
            "AIU_WORLD_RANK_0": f"card {2 * number}",
            "AIU_WORLD_RANK_1": f"card {2 * number + 1}",
            "AIU_WORLD_SIZE": "2",
        }


@pytest.mark.parametrize(
    ("cores", "smt", "quota", "set_by_vllm", "before", "world_size", "expected"),
    [
        pytest.param(3, 1, 3, True, 1, 1, 2, id="vLLM divides 3 cores by 2"),
        pytest.param(8, 1, 8, True, 4, 2, 2, id="the ranks share the engine's cores"),
        pytest.param(2, 1, 2, True, 1, 2, 1, id="a core for two ranks"),
        pytest.param(8, 2, 16, True, 8, 1, 4, id="a thread a core"),
        pytest.param(64, 1, 8, True, 4, 1, 4, id="a container's quota"),
        pytest.param(3, 1, 3, False, 1, 1, 1, id="the user's"),
        pytest.param(8, 2, 16, False, 16, 1, 8, id="the user's, and there are fewer CPUs"),
        pytest.param(64, 1, 8, False, 16, 2, 2, id="the user's, and a quota"),
    ],
)
def test_threads_of_the_second_of_two_engines(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    smt: int,
    quota: int,
    set_by_vllm: bool,
    before: int,
    world_size: int,
    expected: int,
) -> None:
    """
    Args:
        cores: of the host.
        smt: logical CPUs of a core.
        quota: of logical CPUs, for all engines.
        set_by_vllm: whether vLLM, and not the user, has set how many threads there are before.
        before: threads of a rank, as this process started.
        world_size: ranks of an engine.
        expected: threads of a rank.
    """
    host = [Core(0, tuple(number + cores * each for each in range(smt))) for number in range(cores)]
    bound: list[Core] = []
    threads: list[int] = []
    said: list[str] = []
    monkeypatch.setattr(host_share, "usable_cores", lambda: host)
    monkeypatch.setattr(host_share, "bind_to", bound.extend)
    # What is asked after the process is bound counts the engine's CPUs alone.
    monkeypatch.setattr(
        host_share, "available_cpu_count", lambda: min(quota, smt * len(bound or host))
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: before)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(host_share.logger, "info", lambda text, *values: said.append(text % values))
    monkeypatch.setenv("VLLM_OMP_NUM_THREADS_SET_BY_VLLM", "1" if set_by_vllm else "0")
    take_share(engine=1, num_engines=2, rank=0, world_size=world_size, card=False)
    assert bound == host[cores // 2 :]
    assert threads == [expected]
    (line,) = said
    assert line.startswith(f"Engine 1 of the 2 on this host runs on {len(bound)} core")
    assert line.endswith(f"of NUMA node 0 (threads: {expected * world_size})")

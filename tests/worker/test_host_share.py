# SPDX-License-Identifier: Apache-2.0
"""A process takes its engine's part of the host, in a process of its own: it cannot be undone."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

TAKE = """
import json, os, sys, threading
import torch
from vllm_spyre_mm.worker.host_share import take_share

ended = threading.Event()
thread = threading.Thread(target=ended.wait)  # one that was there before
thread.start()
take_share(**json.loads(sys.argv[1]))
print(json.dumps({
    "cpus": [sorted(os.sched_getaffinity(int(name))) for name in os.listdir("/proc/self/task")],
    "threads": torch.get_num_threads(),
    "cards": {name: os.environ[name] for name in sorted(os.environ) if "AIU" in name},
}))
ended.set()
"""
CARDS = {f"AIU_WORLD_RANK_{number}": f"card {number}" for number in range(4)}


def taken(**arguments: Any) -> Any:
    """What a process has after it took its share."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    finished = subprocess.run(
        [sys.executable, "-c", TAKE, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=environment | CARDS,
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
        assert found["threads"] == max(1, len(cpus) // world_size)
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

# SPDX-License-Identifier: Apache-2.0
"""What data-parallel engines have of their host is decided before any of them starts."""

from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import utils as engine_utils
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.frontend import data_parallel
from vllm_spyre_mm.host_cores import Core
from vllm_spyre_mm.host_memory import HostMemory

GIB = 1 << 30


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GiB of which 12 are free, and 4 cores of two threads each."""
    cores = [Core(0, (number, number + 4)) for number in range(4)]
    monkeypatch.setattr(data_parallel, "host_memory", lambda: HostMemory(16 * GIB, 12 * GIB))
    monkeypatch.setattr(data_parallel, "usable_cores", lambda: cores)
    monkeypatch.setattr(data_parallel, "available_cpu_count", lambda: 8)


def configure(checkpoint: Path, **arguments: Any) -> VllmConfig:
    return EngineArgs(
        model=str(checkpoint), gpu_memory_utilization=0.75, **arguments
    ).create_engine_config()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (1, None)),
        ({"data_parallel_size": 2}, (2, 4 * GIB)),
        ({"data_parallel_size": 4}, (4, 2 * GIB)),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2}, (2, 4 * GIB)),
        ({"data_parallel_size": 2, "data_parallel_size_local": 1}, (1, None)),
        ({"data_parallel_size": 2, "data_parallel_size_local": 0}, (1, None)),
    ],
    ids=str,
)
def test_engines_of_one_host_divide_its_memory(
    demo_checkpoint: Path, arguments: dict[str, Any], expected: tuple[int, int | None]
) -> None:
    settings = SpyreSettings.from_vllm_config(configure(demo_checkpoint, **arguments))
    assert (settings.num_local_engines, settings.engine_memory_bytes) == expected


def test_more_engines_than_cores_are_refused(demo_checkpoint: Path) -> None:
    message = r"data-parallel-size-local=5 is more than the cores that may be used here \(4\)"
    with pytest.raises(ValueError, match=message):
        configure(demo_checkpoint, data_parallel_size=5)


def test_more_engines_than_a_containers_quota_are_refused(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as ``--cpus 3``: the container may run on all of the cores."""
    monkeypatch.setattr(data_parallel, "available_cpu_count", lambda: 3)
    with pytest.raises(ValueError, match=r"=4 is more than the cores .* \(3\)"):
        configure(demo_checkpoint, data_parallel_size=4)
    configure(demo_checkpoint, data_parallel_size=3)


def test_other_hosts_cores_are_not_counted(demo_checkpoint: Path) -> None:
    configure(demo_checkpoint, data_parallel_size=8, data_parallel_size_local=4)


def test_hosts_with_an_api_server_each_number_their_engines(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--data-parallel-hybrid-lb``: the second host divides itself, and its first engine is 2."""
    config = configure(
        demo_checkpoint,
        data_parallel_size=4,
        data_parallel_size_local=2,
        data_parallel_hybrid_lb=True,
        data_parallel_start_rank=2,
    )
    settings = SpyreSettings.from_vllm_config(config)
    assert (settings.num_local_engines, settings.engine_memory_bytes) == (2, 4 * GIB)
    started: dict[str, Any] = {}
    monkeypatch.setattr(
        engine_utils, "CoreEngineProcManager", lambda **kwargs: started.update(kwargs)
    )
    monkeypatch.setattr(engine_utils, "wait_for_engine_startup", lambda *_: None)
    addresses = engine_utils.EngineZmqAddresses(inputs=[], outputs=[])
    with engine_utils.launch_core_engines(config, UniProcExecutor, False, addresses):
        numbers = ("local_engine_count", "start_index", "local_start_index")
        assert [started[name] for name in numbers] == [2, 2, 0]


@pytest.mark.parametrize(("num_cards", "cards_each"), [(1, 1), (3, 2), (0, 1)])
def test_every_engine_needs_cards(
    monkeypatch: pytest.MonkeyPatch, num_cards: int, cards_each: int
) -> None:
    for number in range(num_cards):
        monkeypatch.setenv(f"AIU_WORLD_RANK_{number}", f"0000:0{number}:00.0")
    needed = 2 * cards_each
    with pytest.raises(ValueError, match=f"need {needed}, and the environment names {num_cards} "):
        data_parallel._check_cards(2, cards_each)
    for number in range(needed):
        monkeypatch.setenv(f"AIU_WORLD_RANK_{number}", f"0000:0{number}:00.0")
    data_parallel._check_cards(2, cards_each)


def test_a_server_behind_another_balancer_is_one_engine(demo_checkpoint: Path) -> None:
    """vLLM's own words."""
    with pytest.raises(ValueError, match="launch independent vLLM instances"):
        configure(demo_checkpoint, data_parallel_size=2, data_parallel_rank=0)


def test_one_program_has_one_engine(demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own words, for a keyword and for the environment of several programs."""
    with pytest.raises(ValueError, match="is not supported for single-process usage"):
        LLM(model=str(demo_checkpoint), data_parallel_size=2)
    monkeypatch.setenv("VLLM_DP_SIZE", "2")
    with pytest.raises(ValueError, match="not supported/useful for dense models"):
        configure(demo_checkpoint)

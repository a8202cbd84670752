# SPDX-License-Identifier: Apache-2.0
"""What concerns a whole process is left alone where the process is not an engine's."""

import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

import pytest
from vllm import LLM

from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.upstream.processes import is_engine_process
from vllm_spyre_mm.worker import worker

NAMES = {"EngineCore": True, "EngineCore_DP0": True, "VllmWorker-1": True, "Process-1": False}


def taken_for_engines(names: Iterable[str]) -> dict[str, bool]:
    """Whether a process that somebody started would be taken for an engine's, by its name."""
    taken = {}
    for name in names:
        multiprocessing.current_process().name = name
        taken[name] = is_engine_process()
    return taken


def test_the_processes_that_vllm_starts_are_known_by_their_names():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(taken_for_engines, list(NAMES)).result() == NAMES


def test_a_process_without_a_parent_is_somebodys_own():
    assert not is_engine_process()


def test_malloc_is_left_alone_in_a_process_that_is_not_ours(monkeypatch: pytest.MonkeyPatch):
    """``mallopt`` changes how a whole process allocates; the engine below runs in this one."""
    calls = []
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(worker, "mmap_threshold", lambda: calls.append("mallopt"))
    llm = LLM(str(checkpoint_path()), enforce_eager=True, max_model_len=512)
    del llm
    assert calls == []

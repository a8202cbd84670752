# SPDX-License-Identifier: Apache-2.0
"""What concerns a whole process is left alone where the process is not an engine's."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from vllm import LLM

from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.upstream.processes import is_engine_process
from vllm_spyre_mm.worker import worker


def named(name: str) -> bool:
    """Whether a process of that name would be taken for an engine's."""
    multiprocessing.current_process().name = name
    return is_engine_process()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("EngineCore", True), ("EngineCore_DP0", True), ("VllmWorker-1", True), ("Process-1", False)],
)
def test_the_processes_that_vllm_starts_are_known_by_their_names(name: str, expected: bool):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(named, name).result() is expected


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

# SPDX-License-Identifier: Apache-2.0
"""``--scheduling-policy priority``: an urgent request takes the blocks of one that runs already."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, RequestOutput

from tests.e2e.asks import parity_asks
from tests.e2e.engines import Ask, engine, greedy

NUM_BLOCKS = 12
"""Enough for either request to its end and too few for both."""
PARAMETERS = greedy(400, ignore_eos=True)
PATIENT, URGENT = [ask for ask in parity_asks(9, seed=2) if len(ask.images) == 1][:2]


@pytest.fixture(scope="module")
def llm(demo_checkpoint: Path) -> Iterator[LLM]:
    with engine(
        demo_checkpoint,
        scheduling_policy="priority",
        num_gpu_blocks_override=NUM_BLOCKS,
        max_model_len=704,
        enable_prefix_caching=False,
        disable_log_stats=False,
    ) as llm:
        yield llm


def alone(llm: LLM, ask: Ask) -> RequestOutput:
    (output,) = llm.generate([ask.prompt], PARAMETERS, use_tqdm=False)
    return output


def scheduler_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]


def victims(llm: LLM, patch: pytest.MonkeyPatch) -> list[str]:
    """Gets the name of each request that loses its blocks."""
    found: list[str] = []
    scheduler = scheduler_of(llm)
    original = scheduler._preempt_request

    def noting(request: Any, *args: Any, **kwargs: Any) -> None:
        found.append(request.request_id.partition("-")[0])
        original(request, *args, **kwargs)

    patch.setattr(scheduler, "_preempt_request", noting)
    return found


def preemptions(llm: LLM) -> int:
    return sum(
        int(each.value)  # type: ignore[attr-defined]
        for each in llm.get_metrics()
        if each.name == "vllm:num_preemptions"
    )


def test_the_urgent_request_takes_the_blocks_of_the_patient_one(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have the answers and the embeddings that they have alone."""
    expected = {"patient": alone(llm, PATIENT), "urgent": alone(llm, URGENT)}
    preempted, before = victims(llm, monkeypatch), preemptions(llm)
    llm.llm_engine.add_request("patient", PATIENT.prompt, PARAMETERS, priority=5)
    for _ in range(100):
        llm.llm_engine.step()
    llm.llm_engine.add_request("urgent", URGENT.prompt, PARAMETERS, priority=1)
    finished = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = output
    assert list(finished) == ["urgent", "patient"]
    assert set(preempted) == {"patient"}
    assert preemptions(llm) - before == len(preempted)
    for name, output in finished.items():
        found, wanted = output.outputs[0], expected[name].outputs[0]
        assert list(found.token_ids) == list(wanted.token_ids)
        assert torch.equal(found.mm_embedding, wanted.mm_embedding)


def test_without_an_order_of_urgency_the_later_request_gives_way(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that are as urgent, the first keeps its blocks."""
    preempted = victims(llm, monkeypatch)
    llm.llm_engine.add_request("first", PATIENT.prompt, PARAMETERS)
    for _ in range(100):
        llm.llm_engine.step()
    llm.llm_engine.add_request("second", URGENT.prompt, PARAMETERS)
    finished = []
    while llm.llm_engine.has_unfinished_requests():
        finished += [each.request_id for each in llm.llm_engine.step() if each.finished]
    assert finished == ["first", "second"]
    assert set(preempted) == {"second"}

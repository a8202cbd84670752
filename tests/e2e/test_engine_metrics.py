# SPDX-License-Identifier: Apache-2.0
"""``LLM.get_metrics``: an offline engine counts images and embeddings as a server does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from vllm import LLM
from vllm.v1.metrics.reader import Counter, Gauge

from tests.e2e.engines import Ask, engine, greedy
from vllm_spyre_mm.frontend.metrics import COUNTERS, HELD

RED, BLUE = (Image.new("RGB", (60, 60), colour) for colour in ("red", "blue"))
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module", params=[True, False], ids=["a process of its own", "this process"])
def llm(request: pytest.FixtureRequest, demo_checkpoint: Path) -> Iterator[LLM]:
    with engine(
        demo_checkpoint, own_process=request.param, max_model_len=512, disable_log_stats=False
    ) as llm:
        yield llm


def counted(llm: LLM) -> dict[str, int]:
    return {each.name: each.value for each in llm.get_metrics() if isinstance(each, Counter)}


def test_the_counters_count(llm: LLM) -> None:
    """Two pictures are encoded, one is known by then, and a text has none."""
    before = counted(llm)
    asks = [Ask(QUESTION, (RED, BLUE)), Ask("And in this one?", (RED,)), Ask("Hello")]
    for ask in asks:
        llm.generate([ask.prompt], greedy(4), use_tqdm=False)
    after = counted(llm)
    grown = {field: after[name] - before[name] for field, (name, _) in COUNTERS.items()}
    assert grown == {"encoder_runs": 2, "encoder_cache_hits": 1, "mm_embeddings_returned": 2}


def test_the_gauge_shows_what_unfinished_requests_hold(llm: LLM) -> None:
    def held() -> float:
        (gauge,) = (each for each in llm.get_metrics() if each.name == HELD)
        assert isinstance(gauge, Gauge)
        return gauge.value

    assert held() == 0
    llm.llm_engine.add_request("held", Ask(QUESTION, (RED,)).prompt, greedy(8, ignore_eos=True))
    seen = []
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        seen.append(held())
    embedding = outputs[0].outputs[0].mm_embedding
    assert max(seen) == embedding.numel() * embedding.element_size()
    assert seen[-1] == 0

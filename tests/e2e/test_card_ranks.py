# SPDX-License-Identifier: Apache-2.0
"""Two ranks of a card, a process each: what the card's software finds when it is imported."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import SET_FOR_A_CARD, STAND_IN
from tests.e2e.engines import engine, greedy
from vllm_spyre_mm.demo.pictures import Shape, draw_picture
from vllm_spyre_mm.environment import THREAD_COUNTS

OF_RANKS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
QUESTION = "<|user|>\n<image>\nWhat is in the picture?\n<|assistant|>\n"


class LookedInto:
    """Extends a worker: what the stand-in has seen."""

    rank: int

    def seen(self) -> dict[str, Any]:
        from torch._C._distributed_c10d import _resolve_process_group

        record = sys.modules["torch_sendnn"].record
        name: Any = "default"
        return {
            "rank": self.rank,
            "environment": record.environment,
            "faults": record.faults,
            "graphs": len(record.graphs),
            "ranks of the default group": _resolve_process_group(name).size(),
        }


def test_each_rank_is_told_of_itself_and_the_test_of_nothing(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = dict(os.environ)
    picture = draw_picture([Shape("circle", "red", "top left")], (192, 144)).image
    with engine(
        demo_checkpoint,
        own_process=True,
        dtype="auto",
        enforce_eager=False,
        tensor_parallel_size=2,
        max_num_batched_tokens=128,
        max_model_len=500,
        max_num_seqs=4,
        kv_cache_memory_bytes=16 << 20,
        worker_extension_cls=f"{LookedInto.__module__}.{LookedInto.__qualname__}",
    ) as llm:
        prompt: Any = {"prompt": QUESTION, "multi_modal_data": {"image": picture}}
        (output,) = llm.generate(prompt, greedy(12), use_tqdm=False)
        ranks = llm.collective_rpc("seen")
    assert output.outputs[0].text == "a red circle at the top left"
    for number, seen in enumerate(ranks):
        found = seen["environment"]
        assert {name: found.get(name) for name in OF_RANKS} == {
            "RANK": str(number),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "12355",
        }
        assert {found.get(name) for name in THREAD_COUNTS} == {"2"}
        assert found["VLLM_DT_MAX_CONTEXT_LEN"] == "512"
        assert (seen["rank"], seen["graphs"], seen["faults"]) == (number, 2, [])
        assert seen["ranks of the default group"] == 2
    for name in (*SET_FOR_A_CARD, *OF_RANKS, *THREAD_COUNTS):
        assert os.environ.get(name) == before.get(name), name

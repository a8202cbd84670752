# SPDX-License-Identifier: Apache-2.0
"""The card's contract under load, and what is said when its compiler or the device fails."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from tests.e2e.asks import parity_asks
from tests.e2e.engines import Ask, engine, greedy
from tests.reference import Reference
from vllm_spyre_mm.model_executor.card.compile import CardError
from vllm_spyre_mm.scheduler.geometry import Geometry

CHUNK = 128
MAX_MODEL_LEN = 448  # seven blocks: a prompt of six or seven is padded to eight
BATCH_TKV = 1024
MAX_TOKENS = 16

ENGINE = {
    "dtype": "auto",
    "enforce_eager": False,
    "max_num_batched_tokens": CHUNK,
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": 4,
}


@pytest.fixture(scope="module")
def llm(card: None, demo_checkpoint: Path) -> Iterator[LLM]:
    """An engine with a KV cache of 9 blocks and a tight bound on batch × length, so that requests
    are paused and preempted."""
    block_bytes = 64 * 2 * 2 * 128 * 4 * 2
    with engine(
        demo_checkpoint,
        **ENGINE,
        kv_cache_memory_bytes=9 * block_bytes,
        additional_config={"max_batch_tkv": BATCH_TKV},
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def record(llm: LLM) -> Any:
    return sys.modules["torch_sendnn"].record


def many_asks() -> list[Ask]:
    """Four prompts that fill the cache and go on, then some of all lengths, with and without
    pictures, some of them the same."""
    grow = [f"Where is the {colour} circle? " * 16 for colour in ("red", "blue", "green", "yellow")]
    asks = [ask for ask in parity_asks(18, seed=5) if len(ask.images) < 2]
    words = ["Where is the red circle? " * count for count in (1, 20, 48, 60)]
    return [*map(Ask, grow), *asks, *map(Ask, words), asks[1], Ask(words[-1])]


def test_a_workload_that_pauses_and_preempts_keeps_the_contract(
    llm: LLM, record: Any, demo_reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    happened = set()
    preempt, fit = scheduler._preempt_request, Geometry.decode_rows_that_fit

    def preempting(*args: Any, **kwargs: Any) -> None:
        happened.add("preempted")
        preempt(*args, **kwargs)

    def fitting(geometry: Geometry, lengths: list[int]) -> list[int]:
        rows = fit(geometry, lengths)
        if len(rows) < len(lengths):
            happened.add("paused")
        return rows

    monkeypatch.setattr(scheduler, "_preempt_request", preempting)
    monkeypatch.setattr(Geometry, "decode_rows_that_fit", fitting)
    asks = many_asks()
    graphs, before = len(record.graphs), len(record.runs)
    on = greedy(MAX_TOKENS, ignore_eos=True)
    outputs = llm.generate([ask.prompt for ask in asks], on, use_tqdm=False)
    assert not record.faults
    assert len(record.graphs) == graphs
    assert record.compiled_outside == 0
    for ask, output in zip(asks, outputs, strict=True):
        expected = demo_reference.certain_tokens(ask.text, list(ask.images), MAX_TOKENS, margin=0.5)
        assert list(output.outputs[0].token_ids)[: len(expected)] == expected
    rows, widths = zip(*map(table_of, record.runs[before:]), strict=True)
    assert happened == {"paused", "preempted"}
    assert max(rows) >= 3, "nothing was decoded together"
    assert max(widths) * 64 > MAX_MODEL_LEN, "no prompt was padded beyond max_model_len"


def table_of(run: tuple[int, bool, dict[str, tuple[int, ...]]]) -> tuple[int, int]:
    """Rows and width of the block table of a run."""
    _, _, shapes = run
    (shape,) = (shape for name, shape in shapes.items() if "block_table" in name)
    rows, width = shape
    return rows, width


def test_the_bounds_are_what_the_compiler_is_told(record: Any) -> None:
    """The context with its padding: whole chunks."""
    limits = {
        "VLLM_DT_CHUNK_LEN": str(CHUNK),
        "VLLM_DT_MAX_CONTEXT_LEN": "512",
        "VLLM_DT_MAX_BATCH_SIZE": "4",
        "VLLM_DT_MAX_BATCH_TKV_LIMIT": str(BATCH_TKV),
    }
    assert limits.items() <= record.environment.items()


@pytest.mark.parametrize("decodes", [False, True], ids=["chunk", "decode"])
def test_a_graph_that_the_compiler_refuses_is_named_by_its_shape(
    card: None, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, decodes: bool
) -> None:
    """The start ends with a sentence that holds the compiler's own. It compiles when the graphs are
    there, and does not say which of them it refuses."""
    import torch_sendnn
    from torch_sendnn.graphs import is_decode

    def refuse(named: dict[str, Any]) -> str | None:
        said = "Need to find a valid memory space for KV cache"
        return said if is_decode(named) == decodes else None

    torch._dynamo.reset()
    monkeypatch.setattr(torch_sendnn.record, "fail_compiling", refuse)
    message = (
        rf"the card could not compile or run a chunk of {CHUNK} tokens \(embeds \(1, {CHUNK}, 256\)"
        r".* and a decode of \d rows \(embeds \(\d, 1, 256\)"
        r".*DtException: Need to find a valid memory space .*; what may"
    )
    with pytest.raises(CardError, match=message) as error, engine(demo_checkpoint, **ENGINE):
        pass
    assert "give the KV cache fewer blocks with --num-gpu-blocks-override" in str(error.value)
    assert str(error.value).count("block_table (") == 2
    assert str(error.value).count("layers of KV cache (") == 2


def test_a_step_that_the_device_fails_is_named_by_its_shape(
    card: None, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an engine whose chunk is longer than any prompt, which keeps the contract too."""
    import torch_sendnn

    torch._dynamo.reset()
    sizes = {"max_num_batched_tokens": 512, "max_model_len": 192, "max_num_seqs": 2}
    monkeypatch.setattr(
        torch_sendnn.record,
        "environment",
        {
            "VLLM_DT_CHUNK_LEN": "512",
            "VLLM_DT_MAX_CONTEXT_LEN": "512",
            "VLLM_DT_MAX_BATCH_SIZE": "2",
            "VLLM_DT_MAX_BATCH_TKV_LIMIT": "512",
            "COMPILATION_MODE": "offline_decoder",
        },
    )
    with engine(demo_checkpoint, **ENGINE | sizes) as llm:
        expected = torch_sendnn.record.environment
        assert {name: os.environ[name] for name in expected} == expected
        llm.generate("Where is the red circle?", greedy(2), use_tqdm=False)
        assert not torch_sendnn.record.faults
        monkeypatch.setattr(torch_sendnn.record, "fail_running", lambda _: "the device is gone")
        message = r"a chunk of 512 tokens .*DtException: the device is gone"
        with pytest.raises(CardError, match=message):
            llm.generate("Where is the red circle?", greedy(2), use_tqdm=False)

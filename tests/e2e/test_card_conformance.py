# SPDX-License-Identifier: Apache-2.0
"""The card's contract under load, and that the suite which holds it would notice a breach."""

import os
import sys
from collections.abc import Callable, Iterator
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
    assert record.environment == {
        "VLLM_DT_CHUNK_LEN": str(CHUNK),
        "VLLM_DT_MAX_CONTEXT_LEN": "512",
        "VLLM_DT_MAX_BATCH_SIZE": "4",
        "VLLM_DT_MAX_BATCH_TKV_LIMIT": str(BATCH_TKV),
    }


def is_decode(named: dict[str, Any]) -> bool:
    (slots,) = (value for name, value in named.items() if "slot_mapping" in name)
    return slots.shape[1] == 1


@pytest.mark.parametrize("decodes", [False, True], ids=["chunk", "decode"])
def test_a_graph_that_the_compiler_refuses_is_named_by_its_shape(
    card: None, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, decodes: bool
) -> None:
    """The start ends with a sentence that holds the compiler's own."""
    import torch_sendnn

    def refuse(named: dict[str, Any]) -> str | None:
        said = "Need to find a valid memory space for KV cache"
        return said if is_decode(named) == decodes else None

    torch._dynamo.reset()
    monkeypatch.setattr(torch_sendnn.record, "fail_compiling", refuse)
    step = (
        r"a decode of 2 rows \(embeds \(2, 1, 256\)"
        if decodes
        else (rf"a chunk of {CHUNK} tokens \(embeds \(1, {CHUNK}, 256\)")
    )
    message = rf"the card could not compile or run {step}.*DtException: Need to find .*; what may"
    with pytest.raises(CardError, match=message) as error, engine(demo_checkpoint, **ENGINE):
        pass
    assert "give the KV cache fewer blocks with --num-gpu-blocks-override" in str(error.value)
    assert "block_table (" in str(error.value)
    assert "layers of KV cache (" in str(error.value)


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


# -- the suite itself ------------------------------------------------------------------------------


def decode_step(**changes: list[Any]) -> dict[str, torch.Tensor]:
    """A decode of three rows of 5, 70 and 130 tokens that keeps the contract, but for changes."""
    step: dict[str, list[Any]] = {
        "slot_mapping": [[7 * 64 + 4], [3 * 64 + 5], [6 * 64 + 1]],
        "block_table": [[0, 0, 7], [0, 2, 3], [4, 5, 6]],
        "current_tkv_mask": [128 + 5, 64 + 70, 130],
        "left_padded_prompt_mask": [128, 64, 0],
    }
    return {name: torch.tensor(values) for name, values in {**step, **changes}.items()}


def chunk_step(**changes: list[Any]) -> dict[str, torch.Tensor]:
    """The only chunk of a prompt of one block, after a block of padding, but for changes."""
    step: dict[str, list[Any]] = {
        "slot_mapping": [[*range(64), *range(9 * 64, 10 * 64)]],
        "block_table": [[0, 9]],
        "current_tkv_mask": [128],
        "left_padded_prompt_mask": [64],
    }
    return {name: torch.tensor(values) for name, values in {**step, **changes}.items()}


BREACHES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "a real token in block 0": (
        decode_step(
            slot_mapping=[[4], [3 * 64 + 5], [6 * 64 + 1]],
            block_table=[[0, 0, 0], [0, 2, 3], [4, 5, 6]],
            current_tkv_mask=[133, 134, 130],
        ),
        "a real token at position 132 is written to block 0",
    ),
    "a token in another's block": (
        decode_step(slot_mapping=[[7 * 64 + 4], [6 * 64 + 5], [6 * 64 + 1]]),
        "slot 389 is not position 133",
    ),
    "padding in a real block": (
        chunk_step(block_table=[[8, 9]], slot_mapping=[[*range(512, 640)]]),
        "padding at position 0 is written to block 8",
    ),
    "two tokens in one slot": (
        decode_step(
            slot_mapping=[[7 * 64 + 4], [7 * 64 + 4], [6 * 64 + 1]],
            block_table=[[0, 0, 7], [0, 2, 7], [4, 5, 6]],
            current_tkv_mask=[133, 133, 130],
        ),
        "two tokens are written to one slot",
    ),
    "a hole in a table": (
        decode_step(block_table=[[0, 0, 7], [0, 0, 3], [4, 5, 6]]),
        "a block of a row is block 0",
    ),
    "padding that is no whole block": (
        decode_step(left_padded_prompt_mask=[128, 60, 0]),
        "a row from 60 to 134 does not fit",
    ),
    "a batch beyond the bound": (
        decode_step(block_table=[[0] * 15 + [7], [0] * 14 + [2, 3], [0] * 13 + [4, 5, 6]]),
        "3 rows of 1024 tokens exceed the bound of 1024",
    ),
    "a row beyond the context": (
        decode_step(block_table=[[0] * 15 + [7], [0] * 14 + [2, 3], [0] * 13 + [4, 5, 6]]),
        "1024 tokens exceed the context of 512",
    ),
    "a lone row": (
        {name: value[:1] for name, value in decode_step().items()},
        "a decode of 1 rows and 3 blocks: two are the least",
    ),
    "a short chunk": (
        chunk_step(slot_mapping=[[*range(9 * 64, 10 * 64)]], left_padded_prompt_mask=[64]),
        "a step of 64 tokens is neither a chunk of 128 nor a decode",
    ),
    "a spare row too many": (
        decode_step(
            slot_mapping=[[0], [3 * 64 + 5], [6 * 64 + 1]],
            block_table=[[0, 0, 0], [0, 2, 3], [4, 5, 6]],
            current_tkv_mask=[129, 134, 130],
        ),
        "1 of 3 rows are spare",
    ),
}


@pytest.fixture(scope="module")
def faults_of(card: None) -> Callable[[dict[str, torch.Tensor]], list[str]]:
    """The suite's verdict on a step, whose shapes are those of its graph."""
    from torch_sendnn.conformance import Limits, faults_of_run

    limits = Limits(chunk=CHUNK, context=512, batch=4, batch_tkv=BATCH_TKV)
    return lambda step: faults_of_run(step, step, limits)


def test_steps_that_keep_the_contract(
    faults_of: Callable[[dict[str, torch.Tensor]], list[str]],
) -> None:
    assert not faults_of(decode_step())
    assert not faults_of(chunk_step())
    spare = {name: value[1:] for name, value in decode_step().items()}
    spare["slot_mapping"][0], spare["current_tkv_mask"][0] = 0, 129
    spare["block_table"][0], spare["left_padded_prompt_mask"][0] = 0, 128
    assert not faults_of(spare)


@pytest.mark.parametrize("name", list(BREACHES))
def test_a_breach_is_found(
    faults_of: Callable[[dict[str, torch.Tensor]], list[str]], name: str
) -> None:
    step, fault = BREACHES[name]
    assert any(each.startswith(fault) for each in faults_of(step)), faults_of(step)


def test_a_shape_that_the_graph_does_not_stand_for_is_found(card: None) -> None:
    from torch_sendnn.conformance import Limits, faults_of_run

    limits = Limits(chunk=CHUNK, context=512, batch=4, batch_tkv=BATCH_TKV)
    compiled = decode_step()
    wider = {**decode_step(), "slot_mapping": torch.zeros(3, 2, dtype=torch.int64)}
    (fault,) = (each for each in faults_of_run(compiled, wider, limits) if "has shape" in each)
    assert "slot_mapping has shape (3, 2), compiled was (3, 1)" in fault
    narrow = {**decode_step(), "block_table": decode_step()["block_table"].int()}
    assert any("is torch.int32" in each for each in faults_of_run(compiled, narrow, limits))


def test_ghosts_are_found_out(card: None) -> None:
    """A cache that the host wrote to, and one that is not the device's last."""
    from torch_sendnn.device import Device

    device = Device()
    name, host = "l_past_key_value_states_0_0_", torch.zeros(3, 64, 1, 8)
    loaded, faults = device.load({name: host}, in_warmup=True)
    assert not faults
    (first,) = device.store([loaded[0] + 1])
    assert first.isnan().all()
    loaded, faults = device.load({name: first}, in_warmup=False)
    assert not faults
    assert torch.equal(loaded[0], torch.ones_like(host))
    (second,) = device.store([loaded[0] + 1])
    second[0] = 0
    assert device.load({name: second}, in_warmup=False)[1] == [
        "the KV cache was written to on the host"
    ]
    assert device.load({name: first}, in_warmup=False)[1] == [
        "a KV cache was handed over that the device did not return last"
    ]

# SPDX-License-Identifier: Apache-2.0
"""The stand-in for the card's compiler notices each breach of the contract, and nothing else."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.card_steps import (
    ALLOWED,
    BATCH_TKV,
    BREACHES,
    CHUNK,
    MAX_CONTEXT,
    MAX_ROWS,
    Step,
    chunk_step,
    decode_step,
)


@pytest.fixture(scope="module")
def package(card: None) -> Iterator[Any]:
    """The stand-in, imported by a test alone, that takes the signals of its process."""
    with pytest.MonkeyPatch.context() as patch:
        limits = (CHUNK, MAX_CONTEXT, MAX_ROWS, BATCH_TKV)
        names = ("CHUNK_LEN", "MAX_CONTEXT_LEN", "MAX_BATCH_SIZE", "MAX_BATCH_TKV_LIMIT")
        for name, value in zip(names, limits, strict=True):
            patch.setenv(f"VLLM_DT_{name}", str(value))
        import torch_sendnn

        yield torch_sendnn


@pytest.fixture(scope="module")
def faults_of(package: Any) -> Callable[[Step], list[str]]:
    """The verdict on a run, whose shapes are those of its graph."""
    limits = package.Limits(CHUNK, MAX_CONTEXT, MAX_ROWS, BATCH_TKV)
    return lambda step: package.faults_of_run(step, step, limits)


# -- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ALLOWED))
def test_what_the_card_allows(faults_of: Callable[[Step], list[str]], name: str) -> None:
    assert not faults_of(ALLOWED[name])


@pytest.mark.parametrize("name", list(BREACHES))
def test_a_breach_is_found(faults_of: Callable[[Step], list[str]], name: str) -> None:
    step, fault = BREACHES[name]
    assert any(each.startswith(fault) for each in faults_of(step)), faults_of(step)


def test_a_shape_that_the_graph_does_not_stand_for_is_found(package: Any) -> None:
    limits = package.Limits(CHUNK, MAX_CONTEXT, MAX_ROWS, BATCH_TKV)
    compiled = decode_step()
    cache = "l_inputs_past_key_value_states_0_0_"
    larger = {**compiled, cache: torch.zeros(16, 64, 1, 128, dtype=torch.float16)}
    (fault,) = package.faults_of_run(compiled, larger, limits)
    assert fault == f"{cache} has shape (16, 64, 1, 128), compiled was (12, 64, 1, 128)"
    table = "l_inputs_block_table_"
    narrow = {**compiled, table: compiled[table].int()}
    assert any("is torch.int32" in each for each in package.faults_of_run(compiled, narrow, limits))


def test_a_cache_that_is_no_multiple_of_the_batch_is_found(package: Any) -> None:
    """As 15 and 18 blocks are at a batch of 3, and 16 are not."""
    for blocks, expected in ((15, []), (16, ["a KV cache of 16 blocks is no multiple"]), (18, [])):
        limits = package.Limits(CHUNK, MAX_CONTEXT, 3, BATCH_TKV)
        cache = torch.zeros(blocks, 64, 1, 128, dtype=torch.float16)
        names = [name for name in decode_step() if "past_key_value" in name]
        step = {**decode_step(), **{name: cache.clone() for name in names}}
        faults = package.faults_of_run(step, step, limits)
        assert [fault.removesuffix(" of the batch of 3") for fault in faults] == expected


def test_a_tensor_of_inference_mode_is_found(faults_of: Callable[[Step], list[str]]) -> None:
    """As an input, and as a parameter."""
    for name in ("l_embeds_", "l_self_modules_decoder_parameters_weight_"):
        step = decode_step()
        with torch.inference_mode():
            step[name] = step[name].clone()
        assert faults_of(step) == [f"{name} was made in inference mode"]


def test_a_tensor_that_lies_within_another_is_found(
    faults_of: Callable[[Step], list[str]],
) -> None:
    step, name = decode_step(), "l_inputs_slot_mapping_"
    later = torch.cat([torch.zeros(1, 1, dtype=torch.int64), step[name]])[1:]
    apart = torch.stack([step[name], step[name]], dim=-1)[..., 0]
    for same in (later, apart):
        faults = faults_of({**step, name: same})
        assert faults == [f"{name} is not contiguous at offset 0 of its storage"]


# -- graphs ---------------------------------------------------------------------------------------

OPTIONS = {"sendnn.dynamic": True}


def marks_of(package: Any, step: Step, varying: dict[str, tuple[int, ...]]) -> Step:
    """A step as a graph whose dimensions are symbols where ``varying`` says."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(name: str, tensor: torch.Tensor) -> torch.Tensor:
        (dims,) = [dims for kind, dims in varying.items() if kind in name] or [()]
        sizes = [
            DimDynamic.DYNAMIC if dim in dims else DimDynamic.STATIC for dim in range(tensor.ndim)
        ]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(tensor, symbolic_context=context)

    return {name: fake(name, tensor) for name, tensor in step.items()}


@pytest.mark.parametrize(("kind", "step"), [("chunk", chunk_step()), ("decode", decode_step())])
def test_marks_are_those_of_the_table(package: Any, kind: str, step: Step) -> None:
    """Each input that has other marks is named."""
    from torch_sendnn.graphs import DYNAMIC, faults_of_graph

    right = DYNAMIC[kind]
    assert not faults_of_graph(marks_of(package, step, right), OPTIONS)
    for name, dims in right.items():
        given = [tensor for known, tensor in step.items() if name in known]
        if not given:  # levels of deepstack, of which a model without has none
            assert name == "deepstack"
            continue
        size = given[0].shape
        for other in [(), (0,), (1,)]:
            if other == dims or any(dim >= len(size) or size[dim] < 2 for dim in other):
                continue
            faults = faults_of_graph(marks_of(package, step, {**right, name: other}), OPTIONS)
            assert set(faults) == {f"{name} of a {kind} varies in dimensions {other}, not {dims}"}


def test_other_breaches_by_a_graph_are_found(package: Any) -> None:
    from torch_sendnn.graphs import DYNAMIC, faults_of_graph

    graph = marks_of(package, decode_step(), DYNAMIC["decode"])
    for options in (None, {}, {"sendnn.dynamic": False}):
        assert faults_of_graph(graph, options) == [
            f"the options are {options}, not {{'sendnn.dynamic': True}}"
        ]
    (fault,) = faults_of_graph({**graph, "l_inputs_last_n_tokens_": 64}, OPTIONS)
    assert fault == "last_n_tokens is an input of the graph"
    without = {name: each for name, each in graph.items() if "block_table" not in name}
    assert faults_of_graph(without, OPTIONS) == ["a decode has no block_table"]
    weight = "l_self_modules_decoder_parameters_weight_"
    (fault,) = faults_of_graph({**graph, weight: torch.zeros(8, 8)}, OPTIONS)
    assert fault == f"{weight} of shape (8, 8) is torch.float32"
    table = torch.zeros(512, 1, 64, 2, 2)  # RoPE's
    assert not faults_of_graph({**graph, "l_self_rope_": table}, OPTIONS)
    cache = "l_inputs_past_key_value_states_0_0_"
    narrow = torch.zeros(12, 64, 1, 64, dtype=torch.float16)
    (fault,) = faults_of_graph({**graph, cache: narrow}, OPTIONS)
    assert fault == f"{cache} has shape (12, 64, 1, 64), not (blocks, 64, heads, 128)"


def test_logits_are_fp32_of_one_position_or_of_64(package: Any) -> None:
    from torch_sendnn.graphs import faults_of_outputs

    cache = torch.zeros(12, 64, 1, 128, dtype=torch.float16)
    for step, positions in ((chunk_step(), 64), (decode_step(), 1)):
        assert not faults_of_outputs(step, [torch.zeros(3, positions, 8), cache])
        (fault,) = faults_of_outputs(step, [torch.zeros(3, positions, 8).half(), cache])
        assert fault == "the graph gives logits in torch.float16, not torch.float32"
        (fault,) = faults_of_outputs(step, [torch.zeros(3, 65 - positions, 8), cache])
        assert fault == f"the graph gives logits of shape (3, {65 - positions}, 8)"


# -- the device and its runtime -------------------------------------------------------------------


def test_ghosts_are_found_out(package: Any) -> None:
    """A cache that the host wrote to, one that is not the device's last, and one that is kept."""
    device = package.Device()
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
        "a KV cache was handed over that is neither the device's last nor new zeros"
    ]
    for in_warmup in (True, False):
        assert device.load({name: host}, in_warmup)[1] == [
            "a KV cache was handed over again that a step had returned another for"
        ]


def test_new_zeros_may_take_the_place_of_ghosts(package: Any) -> None:
    device = package.Device()
    name = "l_past_key_value_states_0_0_"
    zeros = [torch.zeros(3, 64, 1, 8) for _ in range(2)]
    device.load({name: zeros[0]}, in_warmup=True)
    device.store([zeros[0] + 1])
    loaded, faults = device.load({name: zeros[1]}, in_warmup=False)
    assert not faults
    assert not loaded[0].any()
    larger = torch.zeros(4, 64, 1, 8)
    assert device.load({name: larger}, in_warmup=False)[1] == [
        "a KV cache of a new shape was handed over: (4, 64, 1, 8)"
    ]


def test_the_runtime_takes_signals_behind_pythons_back(package: Any) -> None:
    known = signal.getsignal(signal.SIGTERM)
    package.runtime.take_signals()
    assert package.runtime.taken_signals() == [signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) is known
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.getsignal(each))
        assert each not in package.runtime.taken_signals()


def test_a_call_holds_up_other_threads_and_takes_no_time_of_the_cpu(package: Any) -> None:
    """And one that deploys a program takes the signals again."""
    runtime, turns, done = package.runtime, [0], threading.Event()

    def take_turns() -> None:
        while not done.is_set():
            turns[0] += 1

    for each in runtime.SIGNALS:
        signal.signal(each, signal.getsignal(each))
    other = threading.Thread(target=take_turns)
    other.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.5)  # seconds for which nothing but a call gives Python's lock away
    try:
        time.sleep(0)  # from here on the other thread waits as long
        before, cpu, clock = turns[0], time.thread_time(), time.monotonic()
        runtime.call_device(deploys=False)
        after, cpu, clock = turns[0], time.thread_time() - cpu, time.monotonic() - clock
    finally:
        sys.setswitchinterval(interval)
        done.set()
        other.join()
    assert after == before
    assert cpu < runtime.CALL_SECONDS / 2 < clock
    assert not runtime.taken_signals()
    runtime.call_device(deploys=True)
    assert runtime.taken_signals() == list(runtime.SIGNALS)
    for each in runtime.SIGNALS:
        signal.signal(each, signal.getsignal(each))


def test_another_compiler_in_warmup_mode_is_found(package: Any, tmp_path: Path) -> None:
    number = len(package.record.faults)
    with package.warmup_mode():
        torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))
    assert package.record.faults[number:] == [
        "1 graphs of another compiler were made in warmup mode"
    ]

# SPDX-License-Identifier: Apache-2.0
"""The contract with the card's compiler, held against a stand-in for ``torch_sendnn``.

The stand-in runs each graph with PyTorch, so the answers can be compared too; FMS's reference
implementation of the card's attention op is slow on a CPU, so the requests are few and short.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig
from vllm import LLM, RequestOutput

from tests import architectures, granite4_vision, idefics3, llava_onevision, qwen_vl
from tests.e2e.asks import parity_asks
from tests.e2e.engines import Ask, engine, greedy
from tests.reference import Reference

CHUNK = 128
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    return [ask for ask in parity_asks(12) if len(ask.images) < 2]


@pytest.fixture(scope="module")
def served(
    card: None, demo_checkpoint: Path, asks: list[Ask]
) -> Iterator[tuple[LLM, list[RequestOutput]]]:
    """An engine for the card, with everything that it was asked."""
    with engine(
        demo_checkpoint,
        dtype="auto",
        enforce_eager=False,
        max_num_batched_tokens=CHUNK,
        max_model_len=512,
        max_num_seqs=4,
        kv_cache_memory_bytes=16 << 20,
        additional_config={"encoder_dtype": "float32"},
    ) as llm:
        record = sys.modules["torch_sendnn"].record
        record.runs_of_start = list(record.runs)
        outputs = llm.generate([ask.prompt for ask in asks], greedy(MAX_TOKENS), use_tqdm=False)
        outputs += llm.generate([asks[1].prompt], greedy(MAX_TOKENS), use_tqdm=False)
        yield llm, outputs


@pytest.fixture(scope="module")
def record(served: Any) -> Any:
    return sys.modules["torch_sendnn"].record


def shape_of(graph: dict[str, Any], name: str) -> tuple[int | torch.SymInt, ...]:
    (tensor,) = (value for key, value in graph.items() if name in key)
    return tuple(tensor.shape)


def shape_of_run(shapes: dict[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    (shape,) = (value for key, value in shapes.items() if name in key)
    return shape


def is_static(shape: tuple[int | torch.SymInt, ...]) -> tuple[bool, ...]:
    return tuple(isinstance(size, int) for size in shape)


def test_environment_is_set_before_the_import(record: Any) -> None:
    expected = {
        "VLLM_DT_CHUNK_LEN": "128",
        "VLLM_DT_MAX_CONTEXT_LEN": "512",
        "VLLM_DT_MAX_BATCH_SIZE": "4",
        "VLLM_DT_MAX_BATCH_TKV_LIMIT": "2048",
        "COMPILATION_MODE": "offline_decoder",
        "FLEX_OVERWRITE_NMB_FRAME": "true",
    }
    assert {name: record.environment.get(name) for name in expected} == expected


COMPLETE = {
    "VLLM_DT_CHUNK_LEN": "512",
    "VLLM_DT_MAX_CONTEXT_LEN": "3072",
    "VLLM_DT_MAX_BATCH_SIZE": "4",
    "VLLM_DT_MAX_BATCH_TKV_LIMIT": "4096",
    "COMPILATION_MODE": "offline_decoder",
}
OF_FOUR = COMPLETE | {
    "WORLD_SIZE": "4",
    **dict.fromkeys(
        ("RANK", "DT_PARALLEL_THREADS", "FLEX_HDMA_P2PSIZE", "FLEX_HDMA_COLLSIZE"), "1"
    ),
}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"VLLM_DT_CHUNK_LEN": "unset"}, "the limits are"),
        ({"VLLM_DT_MAX_CONTEXT_LEN": "768"}, "no programs for 768 tokens in chunks of 512"),
        ({"VLLM_DT_CHUNK_LEN": "640"}, "no programs for 3072 tokens in chunks of 640"),
        ({"VLLM_DT_MAX_BATCH_SIZE": "1"}, "a batch of 1 is less than 2"),
        ({"COMPILATION_MODE": "offline"}, "COMPILATION_MODE is offline, not offline_decoder"),
        ({"FLEX_OVERWRITE_NMB_FRAME": "1"}, None),
        ({"FLEX_OVERWRITE_NMB_FRAME": "false"}, "FLEX_OVERWRITE_NMB_FRAME is false, not true"),
        ({"WORLD_SIZE": "1"}, "WORLD_SIZE is 1, not 4"),
        ({"RANK": None}, "RANK is not set"),
        ({"FLEX_HDMA_COLLSIZE": None}, "FLEX_HDMA_COLLSIZE is not set"),
    ],
)
def test_the_stand_in_notices_a_variable_that_is_missing(
    card: None, changes: dict[str, str | None], fault: str | None
) -> None:
    from torch_sendnn.variables import faults_of_environment

    changed = {name: value for name, value in (OF_FOUR | changes).items() if value is not None}
    faults = faults_of_environment(changed, 4)
    assert (fault is None) == (not faults)
    assert all(fault in found for found in faults)
    if not changes:
        assert not faults_of_environment(COMPLETE, 1)


def test_one_graph_for_prefill_and_one_for_decode(record: Any) -> None:
    """``fullgraph=True`` makes a graph break an error; more graphs would be recompilations."""
    assert [str(shape_of(graph, "slot_mapping")[1]) == "1" for graph in record.graphs] == [
        False,
        True,
    ]


def test_warmup_mode_is_entered_once_and_left_before_serving(record: Any) -> None:
    assert record.warmups == 1
    assert not record.in_warmup
    assert record.compiled_outside == 0


def test_the_warmup_is_one_chunk_and_one_decode_and_they_are_deployed(record: Any) -> None:
    """Nothing else runs before each program is compiled and deployed."""
    assert [(graph, in_warmup) for graph, in_warmup, _ in record.runs_of_start[:4]] == [
        (0, True),
        (1, True),
        (0, False),
        (1, False),
    ]
    assert not any(in_warmup for _, in_warmup, _ in record.runs[4:])
    chunk, decode = (shapes for _, _, shapes in record.runs[2:4])
    assert shape_of_run(chunk, "block_table") == (1, CHUNK // 64)
    assert shape_of_run(decode, "slot_mapping")[1] == 1


def test_signals_are_pythons_again(record: Any) -> None:
    assert not sys.modules["torch_sendnn"].runtime.taken_signals()


def test_prefill_dimensions(record: Any) -> None:
    prefill = record.graphs[0]
    assert is_static(shape_of(prefill, "embeds")) == (True, False, True)
    assert is_static(shape_of(prefill, "position_ids")) == (True, False)
    assert is_static(shape_of(prefill, "slot_mapping")) == (True, False)
    assert is_static(shape_of(prefill, "block_table")) == (True, False)
    assert shape_of(prefill, "current_tkv_mask") == (1,)
    assert shape_of(prefill, "left_padded_prompt_mask") == (1,)


def test_decode_dimensions(record: Any) -> None:
    decode = record.graphs[1]
    assert is_static(shape_of(decode, "embeds")) == (False, True, True)
    assert is_static(shape_of(decode, "position_ids")) == (False, True)
    assert is_static(shape_of(decode, "slot_mapping")) == (False, True)
    assert is_static(shape_of(decode, "block_table")) == (False, False)
    assert is_static(shape_of(decode, "current_tkv_mask")) == (False,)


def test_decoder_is_fp16_and_its_heads_are_padded(record: Any) -> None:
    for graph in record.graphs:
        floating = [
            value
            for value in graph.values()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        ]
        wide = [value for value in floating if value.dtype != torch.float16]
        # FMS keeps its rotary table in fp32.
        assert wide
        assert all(tuple(value.shape[-2:]) == (2, 2) for value in wide)
        caches = [value for name, value in graph.items() if "past_key_value" in name]
        assert caches
        assert all(cache.shape[-1] == 128 for cache in caches)


def test_encoder_has_a_dtype_of_its_own(served: tuple[LLM, list[RequestOutput]]) -> None:
    _, outputs = served
    embeddings = [output.outputs[0].mm_embedding for output in outputs]
    dtypes = {embedding.dtype for embedding in embeddings if embedding is not None}
    assert dtypes == {torch.float32}


def test_a_lone_row_and_a_lone_block_take_the_graph_of_more(record: Any) -> None:
    """Dynamo makes a size of 1 a constant unless it is told otherwise."""
    decodes = [shapes for graph, _, shapes in record.runs if graph == 1]
    rows, widths = zip(*(shape_of_run(shapes, "block_table") for shapes in decodes), strict=True)
    assert min(rows) == min(widths) == 1
    assert max(rows) > 1
    assert max(widths) > 1
    assert len(record.graphs) == 2


def test_answers_equal_transformers(
    served: tuple[LLM, list[RequestOutput]], asks: list[Ask], demo_reference: Reference
) -> None:
    _, outputs = served
    for ask, output in zip([*asks, asks[1]], outputs, strict=True):
        expected = demo_reference.generate(ask.text, list(ask.images), MAX_TOKENS)
        assert list(output.outputs[0].token_ids) == expected


def test_the_contract_of_every_run(record: Any) -> None:
    """Shapes, bounds and slots; see ``stand_in/torch_sendnn/conformance.py``."""
    assert not record.faults


def test_the_host_holds_nothing_of_the_kv_cache(served: tuple[LLM, list[RequestOutput]]) -> None:
    """What it holds is NaN, and the answers are right."""
    llm, _ = served
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    for caches in runner.spyre_model.kv_cache:
        for cache in caches:
            assert cache.isnan().all()


def test_poisoned_padding_changes_nothing(
    served: tuple[LLM, list[RequestOutput]], asks: list[Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the embeddings of padding tokens, in block 0 and in every block."""
    llm, outputs = served
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    model = runner.spyre_model
    original, found = model.embed, []
    assert model.mapping.image_token_id != 0

    def poisoned(token_ids: torch.Tensor) -> torch.Tensor:
        embeds = original(token_ids)
        is_padding = token_ids == 0
        found.append(int(is_padding.sum()))
        return torch.where(is_padding.unsqueeze(-1), torch.nan, embeds)

    llm.reset_prefix_cache()
    sys.modules["torch_sendnn"].device.poison()
    monkeypatch.setattr(model, "embed", poisoned)
    again = llm.generate([ask.prompt for ask in asks[:3]], greedy(MAX_TOKENS), use_tqdm=False)
    assert sum(found) > 0
    for before, after in zip(outputs[:3], again, strict=True):
        assert after.outputs[0].token_ids == before.outputs[0].token_ids


ENCODED_APART = {"LLaVA-Next, CLIP, Llama", "Granite Vision 4, SigLIP, Granite", "Qwen2.5-VL"}
"""What has the encoder's process below, as users have it: one feature layer, several levels, and a
grid of patches. For the others the worker encodes, which saves their tests a process each."""

ARCHITECTURES: dict[str, PretrainedConfig] = {
    "LLaVA-Next, CLIP, Llama": architectures.llava_next(
        architectures.llama(num_attention_heads=1, num_key_value_heads=1)
    ),
    "LLaVA, CLIP, Mistral": architectures.llava(architectures.mistral(head_dim=128)),
    "Mistral 3, Ministral 3": architectures.mistral3(architectures.ministral3(head_dim=128)),
    "Idefics 3, Llama": idefics3.idefics3(
        architectures.llama(num_attention_heads=2, num_key_value_heads=1)  # padded from 64
    ),
    "Granite Vision 4, SigLIP, Granite": granite4_vision.granite4_vision(
        text_config__logits_scaling=0.5
    ),
    "Granite": architectures.granite(
        num_attention_heads=1, num_key_value_heads=1, logits_scaling=0.5
    ),
    "LLaVA-OneVision, SigLIP, Qwen 2": llava_onevision.llava_onevision(
        architectures.qwen2(num_attention_heads=1, num_key_value_heads=1)
    ),
    "Granite 4, dense": architectures.granite4(
        num_attention_heads=2, num_key_value_heads=1, logits_scaling=0.5
    ),
    "Llama": architectures.llama(num_attention_heads=1, num_key_value_heads=1),
    "Mistral": architectures.mistral(head_dim=128),
    "Qwen 2": architectures.qwen2(num_attention_heads=1, num_key_value_heads=1),
    "Qwen 3": architectures.qwen3(head_dim=128),
    "Qwen3-VL": qwen_vl.qwen3_vl(),
    "Qwen2.5-VL": qwen_vl.qwen2_5_vl(),
}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_each_architecture_is_one_graph_for_prefill_and_one_for_decode(
    card: None, tmp_path: Path, name: str
) -> None:
    """And answers as Transformers does, as far as fp16 can tell the two best tokens apart."""
    torch._dynamo.reset()
    checkpoint = architectures.save_checkpoint(tmp_path, ARCHITECTURES[name])
    reference = Reference(checkpoint)
    tag = getattr(reference.processor, "image_token", None)
    if reference.config.model_type in qwen_vl.MODEL_TYPES:
        tag = qwen_vl.IMAGE
    asks = [
        replace(ask, tag=tag or "")
        for ask in parity_asks(8, seed=3)
        if len(ask.images) < (2 if tag else 1)
    ]
    package = sys.modules.get("torch_sendnn")
    before = len(package.record.graphs) if package else 0
    with engine(
        checkpoint,
        dtype="auto",
        enforce_eager=False,
        max_num_batched_tokens=CHUNK,
        max_model_len=512,
        max_num_seqs=4,
        kv_cache_memory_bytes=16 << 20,
        additional_config={"encode_ahead": name in ENCODED_APART},
    ) as llm:
        record = sys.modules["torch_sendnn"].record
        number = len(record.graphs)
        outputs = llm.generate([ask.prompt for ask in asks], greedy(MAX_TOKENS), use_tqdm=False)
        assert len(record.graphs) == number == before + 2
        assert not record.faults
    compared = 0
    for ask, output in zip(asks, outputs, strict=True):
        certain = reference.certain_tokens(ask.text, list(ask.images), MAX_TOKENS, margin=0.5)
        assert list(output.outputs[0].token_ids)[: len(certain)] == certain
        compared += len(certain)
    assert compared >= len(asks)


def test_an_eager_engine_beside_a_card_leaves_it_alone(card: None, demo_checkpoint: Path) -> None:
    package = sys.modules["torch_sendnn"]
    before = len(package.record.runs)
    with engine(demo_checkpoint) as llm:
        output = llm.generate("Where is the red circle?", greedy(2), use_tqdm=False)
    assert output[0].outputs[0].token_ids
    assert len(package.record.runs) == before


def test_a_card_needs_two_blocks_in_a_chunk(card: None, demo_checkpoint: Path) -> None:
    with (
        pytest.raises(ValueError, match="chunks of at least 128 tokens, got 64"),
        engine(demo_checkpoint, dtype="auto", enforce_eager=False, max_num_batched_tokens=64),
    ):
        pass


def test_a_card_runs_fp16(card: None, demo_checkpoint: Path) -> None:
    with (
        pytest.raises(ValueError, match="runs the decoder in float16, not float32"),
        engine(demo_checkpoint, dtype="float32", enforce_eager=False),
    ):
        pass

# SPDX-License-Identifier: Apache-2.0
"""Deepstack in compiled decoders.

For the card the levels are inputs of the one graph for chunks. For the CPU they are added outside
of the one graph for blocks, which knows nothing of them.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tests import architectures
from tests.worker.test_deepstack import LAYERS, Stacked, mapping_of
from vllm_spyre_mm.config import BackendName, CardSettings
from vllm_spyre_mm.model_executor.backend import StepSizes, WarmupWork
from vllm_spyre_mm.model_executor.backends import make_backend
from vllm_spyre_mm.model_executor.kv_cache import allocate_kv_cache
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.model_executor.model import SpyreModel
from vllm_spyre_mm.model_executor.step_inputs import DecodeRows
from vllm_spyre_mm.multimodal.merge import TEXT
from vllm_spyre_mm.scheduler.geometry import Geometry
from vllm_spyre_mm.worker.prefill import prefill_chunk
from vllm_spyre_mm.worker.warmup import _run_graphs

BLOCK, CHUNK, BLOCKS = 64, 128, 8
SIZES = StepSizes(BLOCK, CHUNK, 512, 1024, 4, BLOCKS)
GEOMETRY = Geometry(block_size=BLOCK, chunk_size=CHUNK, max_batch_tkv=1024)
PROMPT = [8 + number * 7 % 400 for number in range(70)]


def load(checkpoint: Path, backend: BackendName, dtype: torch.dtype) -> SpyreModel[Stacked]:
    mapping, for_card = mapping_of(checkpoint), backend == "sendnn"
    chosen = make_backend(backend, SIZES, CardSettings())
    chosen.prepare()
    fms_model = load_model(mapping, checkpoint, LoadOptions(dtype, torch.float32, for_card))
    model = SpyreModel(fms_model, mapping, chosen)
    model.compile()
    with chosen.without_gradients():
        options = mapping.kv_cache_options(for_card)
        model.kv_cache = allocate_kv_cache(options, BLOCKS, BLOCK, dtype, 1)
    return model


def warm_up(model: SpyreModel[Stacked]) -> None:
    runner: Any = SimpleNamespace(spyre_model=model, inputs=model.backend.inputs, geometry=GEOMETRY)
    for each in model.warmup_passes():
        if each.work is WarmupWork.GRAPHS:
            with each.context:
                _run_graphs(runner, each.title)


def serve(model: SpyreModel[Stacked], scale: float | None) -> list[torch.Tensor]:
    """Logits of a chunk whose features are scaled by a number, and of a decode after it.

    Without a number the chunk is text.
    """
    inputs, mapping = model.backend.inputs, model.mapping
    index = np.array([TEXT, *range(40), *[TEXT] * (len(PROMPT) - 41)])
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, mapping.feature_width, generator=generator) * (scale or 0)
    with model.backend.without_gradients():
        chunk = prefill_chunk(
            token_ids=PROMPT,
            start=0,
            num_tokens=len(PROMPT),
            blocks=[1, 2],
            feature_index=index,
            geometry=GEOMETRY,
            padded=inputs.padded,
        )
        embeds = model.embed(chunk.token_ids)
        levels: tuple[torch.Tensor, ...] = ()
        if scale is not None:
            embeds = mapping.merge(embeds, features, chunk.feature_index)
            levels = mapping.merge_levels(embeds, features, chunk.feature_index)
        first = model.forward(inputs.chunk_inputs(chunk, embeds, levels))
        table = np.tile(np.arange(1, 1 + BLOCKS, dtype=np.int32), (SIZES.max_num_seqs, 1))
        rows = DecodeRows([9], [len(PROMPT)], [len(PROMPT)], [[1, 2]], table)
        second = model.forward(inputs.decode_inputs(rows, model.embed))
        return [
            inputs.chunk_logits(first, chunk)[0].float(),
            inputs.decode_logits(second, 1)[0].float(),
        ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = architectures.mistral(num_hidden_layers=4, head_dim=128)
    path = tmp_path_factory.mktemp("stacked")
    return architectures.save_checkpoint(path, architectures.llava_next(text))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[torch.Tensor]:
    """Of the decoder in PyTorch's operators, which other tests hold against Transformers."""
    host = load(checkpoint, "eager", torch.float32)
    logits, without = serve(host, 0.3), serve(host, 0.0)
    for with_features, text in zip(logits, without, strict=True):
        assert (text - with_features).abs().max() > with_features.std(), "they matter little"
    return logits


def assert_close(
    served: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float
) -> None:
    for ours, theirs in zip(served, expected, strict=True):
        assert (ours - theirs).abs().max() < tolerance * theirs.std()


def test_on_the_cpu_a_graph_that_was_made_for_a_text_serves_features(
    checkpoint: Path, expected: list[torch.Tensor]
) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = load(checkpoint, "inductor", torch.float32)
    for each in model.warmup_passes():
        with each.context:
            serve(model, None)
    assert counters["stats"]["unique_graphs"] == 1
    assert_close(serve(model, 0.3), expected, 1e-3)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.fixture(scope="module")
def served(card: None, checkpoint: Path) -> list[torch.Tensor]:
    model = load(checkpoint, "sendnn", torch.float16)
    warm_up(model)
    return serve(model, 0.3)


@pytest.fixture(scope="module")
def record(served: list[torch.Tensor]) -> Any:
    return sys.modules["torch_sendnn"].record


def test_on_the_card_logits_are_those_of_the_host(
    served: list[torch.Tensor], expected: list[torch.Tensor]
) -> None:
    assert_close(served, expected, 0.03)


def test_the_contract_is_kept(record: Any) -> None:
    assert record.faults == []


def test_the_levels_are_inputs_of_chunks_alone(record: Any) -> None:
    """Also of the warmup's chunk, which is text: they are zeros there."""
    levels = [[name for name in graph if "deepstack" in name] for graph in record.graphs]
    assert [len(names) for names in levels] == [len(LAYERS), 0]
    assert record.compiled_outside == 0

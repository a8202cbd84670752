# SPDX-License-Identifier: Apache-2.0
"""Positions on three axes on a card: the stand-in runs a chunk's graph and a decode's."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests import architectures
from tests.model_executor.decoder_steps import GEOMETRY, SIZES, Served, table
from tests.model_executor.mrope_models import (
    FAMILIES,
    ReferenceDecoder,
    mapping_of,
    positions_with_picture,
)
from vllm_spyre_mm.config import CardSettings
from vllm_spyre_mm.model_executor.card.backend import CardBackend
from vllm_spyre_mm.model_executor.step_inputs import DecodeRows


def shape_of(graph: dict[str, Any], part: str) -> tuple[Any, ...]:
    (tensor,) = (each for name, each in graph.items() if part in name)
    return tuple(tensor.shape)


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Qwen3-VL"])
def test_a_picture_in_two_chunks_and_decodes_beside_a_text(
    card: None, tmp_path: Path, name: str
) -> None:
    family = FAMILIES[name]
    checkpoint = architectures.save_checkpoint(tmp_path, family.text)
    torch._dynamo.reset()
    package = sys.modules.get("torch_sendnn")
    before = len(package.record.graphs) if package else 0
    mapping = mapping_of(family, AutoConfig.from_pretrained(checkpoint))
    served = Served(mapping, checkpoint, CardBackend(SIZES, CardSettings()), torch.float16)
    record = sys.modules["torch_sendnn"].record

    positions, delta = positions_with_picture(50, 12, 11, 5)
    with_picture = [*range(10, 10 + positions.shape[1])]
    text = [*range(300, 370)]
    count = len(with_picture)
    later = torch.arange(count, count + 3).expand(3, -1) + delta
    generated = [40, 50, 60]
    reference = ReferenceDecoder(family, checkpoint)
    expected = reference.logits(with_picture + generated, torch.cat((positions, later), dim=1))
    expected_text = reference.logits(text + generated, torch.arange(73).expand(3, -1))

    cut = GEOMETRY.chunk_end(count, 0)
    assert GEOMETRY.left_padding(count) > 0
    served.chunk(with_picture, 0, cut, [1, 5, 2, 7], positions)
    logits = served.chunk(with_picture, cut, count, [1, 5, 2, 7], positions)
    assert_near(logits[0], expected[count - 1])
    assert_near(served.chunk(text, 0, 70, [3, 4], None)[0], expected_text[69])
    blocks = [[1, 5, 2, 7], [3, 4]]
    for step, token in enumerate(generated):
        computed = [count + step, 70 + step]
        at = [computed[0] + delta, computed[1]]
        logits = served.decode(DecodeRows([token] * 2, computed, at, blocks, table(blocks)))
        assert_near(logits[0], expected[computed[0]])
        assert_near(logits[1], expected_text[computed[1]])

    assert not record.faults
    chunk, decode = record.graphs[before:]
    assert shape_of(chunk, "position_ids")[2:] == (64, 2, 2)
    assert shape_of(decode, "position_ids")[1:] == (1, 64, 2, 2)


def assert_near(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Close in fp16; with positions that are wrong by one the error is a half and more."""
    error = (ours.float() - expected).norm() / expected.norm()
    assert error < 2e-2

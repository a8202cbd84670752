# SPDX-License-Identifier: Apache-2.0
"""Decoders with positions on three axes answer as Transformers' do, in chunks and decodes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests import architectures
from tests.model_executor.decoder_steps import CHUNK, SIZES, Served, table
from tests.model_executor.mrope_models import (
    FAMILIES,
    Family,
    ReferenceDecoder,
    mapping_of,
    positions_with_picture,
)
from vllm_spyre_mm.model_executor.cpu.backend import CpuBackend
from vllm_spyre_mm.model_executor.step_inputs import DecodeRows


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.save_checkpoint(tmp_path_factory.mktemp("mrope"), family.text)


@pytest.fixture(scope="module")
def reference(family: Family, checkpoint: Path) -> ReferenceDecoder:
    return ReferenceDecoder(family, checkpoint)


@pytest.fixture(scope="module", params=[False, True], ids=["eager", "compiled"])
def served(request: pytest.FixtureRequest, family: Family, checkpoint: Path) -> Served:
    mapping = mapping_of(family, AutoConfig.from_pretrained(checkpoint))
    return Served(mapping, checkpoint, CpuBackend(SIZES, compiled=request.param), torch.float32)


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_chunks_that_cut_a_picture_and_decodes_behind_it(
    served: Served, reference: ReferenceDecoder
):
    """Beside a text whose positions are its indices; one graph serves all of it."""
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    positions, delta = positions_with_picture(50, 12, 11, 20)
    generator = torch.Generator().manual_seed(2)
    with_picture = torch.randint(10, 400, (positions.shape[1],), generator=generator).tolist()
    text = torch.randint(10, 400, (70,), generator=generator).tolist()
    generated = torch.randint(10, 400, (2, 5), generator=generator).tolist()
    picture_blocks, text_blocks = [1, 5, 2, 7], [3, 4]

    later = torch.arange(len(with_picture), len(with_picture) + 5).expand(3, -1) + delta
    expected = reference.logits(with_picture + generated[0], torch.cat((positions, later), dim=1))
    expected_text = reference.logits(text + generated[1], torch.arange(75).expand(3, -1))

    for start, end in ((0, CHUNK), (CHUNK, len(with_picture))):
        logits = served.chunk(with_picture, start, end, picture_blocks, positions)
        assert_close(logits[0], expected[end - 1])
    assert_close(served.chunk(text, 0, 70, text_blocks, None)[0], expected_text[69])
    block_rows = table([picture_blocks, text_blocks])
    for step in range(5):
        computed = [len(with_picture) + step, len(text) + step]
        rows = DecodeRows(
            [tokens[step] for tokens in generated],
            computed,
            [computed[0] + delta, computed[1]],
            [picture_blocks, text_blocks],
            block_rows,
        )
        logits = served.decode(rows)
        assert_close(logits[0], expected[computed[0]])
        assert_close(logits[1], expected_text[computed[1]])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("axis", range(3))
def test_positions_that_are_wrong_by_one_are_seen(
    served: Served, reference: ReferenceDecoder, axis: int
):
    """One token of a picture, on one axis."""
    positions, _ = positions_with_picture(20, 6, 7, 20)
    token_ids = [*range(10, 10 + positions.shape[1])]
    expected = reference.logits(token_ids, positions)[-1]
    right = served.chunk(token_ids, 0, len(token_ids), [1, 2], positions)
    assert_close(right[0], expected)
    wrong = positions.clone()
    wrong[axis, 30] += 1
    moved = served.chunk(token_ids, 0, len(token_ids), [1, 2], wrong)
    with pytest.raises(AssertionError):
        assert_close(moved[0], expected)


def test_a_decode_that_forgets_the_distance_is_seen(served: Served, reference: ReferenceDecoder):
    positions, delta = positions_with_picture(20, 6, 7, 20)
    token_ids = [*range(10, 10 + positions.shape[1])]
    count = len(token_ids)
    later = torch.full((3, 1), count + delta)
    expected = reference.logits([*token_ids, 99], torch.cat((positions, later), dim=1))[-1]
    served.chunk(token_ids, 0, count, [1, 2], positions)
    rows = table([[1, 2]])
    right = served.decode(DecodeRows([99], [count], [count + delta], [[1, 2]], rows))
    assert_close(right[0], expected)
    for wrong in (count, count + delta + 1):
        moved = served.decode(DecodeRows([99], [count], [wrong], [[1, 2]], rows))
        with pytest.raises(AssertionError):
            assert_close(moved[0], expected)


def test_no_table_of_positions_is_in_memory(served: Served):
    """FMS's would have a row for each of ``max_position_embeddings``."""
    base = served.model.fms_model.language_model.base_model
    assert not base.rot_emb.cached_freqs

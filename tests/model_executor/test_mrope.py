# SPDX-License-Identifier: Apache-2.0
"""RoPE with positions on three axes turns what Transformers turns."""

from typing import Any

import pytest
import torch
from fms.modules.positions import RotaryEmbedding
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from tests.model_executor.mrope_models import FAMILIES, HEAD_DIM, INTERLEAVED, SECTIONED, THETA
from vllm_spyre_mm.model_executor.cpu.kernels.rope import CpuStepRope
from vllm_spyre_mm.model_executor.models.mrope import MRope, StepRope, mrope_mismatch

ROTARY: dict[str, Any] = {
    "Qwen2-VL": Qwen2VLRotaryEmbedding,
    "Qwen2.5-VL": Qwen2_5_VLRotaryEmbedding,
    "Qwen3-VL": Qwen3VLTextRotaryEmbedding,
}


def step_rope(mrope: MRope, head_dim: int = HEAD_DIM) -> StepRope:
    return StepRope(RotaryEmbedding(head_dim, ratio=THETA), mrope)


def any_positions(tokens: int = 40) -> torch.Tensor:
    """Each axis on its own, also beyond what any table would hold."""
    return torch.randint(0, 300_000, (3, tokens), generator=torch.Generator().manual_seed(1))


def theirs(name: str, positions: torch.Tensor) -> torch.Tensor:
    """Cosines and sines of Transformers, ``(1, tokens, head_dim / 2, 2)``, of half a head."""
    rotary = ROTARY[name](FAMILIES[name].vl_config)
    cosines, sines = rotary(torch.zeros(1), positions[:, None])
    return torch.stack((cosines, sines), dim=-1)[:, :, : HEAD_DIM // 2]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_angles_are_those_of_transformers(name: str):
    rope, positions = step_rope(FAMILIES[name].mrope), any_positions()
    columns = rope.columns(positions)
    assert columns.dtype == torch.float32
    assert columns.is_contiguous()
    assert torch.equal(columns, theirs(name, positions))
    for axis in range(3):
        moved = positions.clone()
        moved[axis] += 1
        assert not torch.allclose(rope.columns(moved), columns, atol=1e-3)


@pytest.mark.parametrize("mrope", [SECTIONED, INTERLEAVED])
def test_equal_axes_are_one_and_that_is_fmss_rotation(mrope: MRope):
    original = RotaryEmbedding(HEAD_DIM, ratio=THETA, max_seq_len=100)
    original.compute_freqs_cis(torch.device("cpu"), 100)
    rope, positions = StepRope(original, mrope), torch.randint(0, 100, (1, 30))
    assert torch.equal(rope.columns(positions), rope.columns(positions.expand(3, -1)))
    rotations = rope.rotations(positions)
    assert torch.equal(rotations, original.cached_freqs[None][1][positions])
    parts = torch.randn(1, 30, 4, HEAD_DIM), torch.randn(1, 30, 2, HEAD_DIM)
    for ours, expected in zip(
        rope.adjusted_qk(*parts, rotations), original.adjusted_qk(*parts, positions), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_kernel_rotates_the_same(dtype: torch.dtype, tokens: int):
    """Each token by its own row of the step's table."""
    torch.manual_seed(0)
    rope, positions = step_rope(INTERLEAVED), any_positions(tokens)
    query, keys, _ = torch.randn(1, tokens, 7, HEAD_DIM).to(dtype).split([4, 2, 1], dim=2)
    expected = rope.adjusted_qk(query, keys, rope.rotations(positions))
    rotated = CpuStepRope().adjusted_qk(query, keys, rope.columns(positions))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for actual, wanted in zip(rotated, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def test_more_tokens_than_rows_are_refused():
    parts = torch.randn(1, 4, 4, HEAD_DIM), torch.randn(1, 4, 2, HEAD_DIM)
    with pytest.raises(IndexError, match="1 positions are beyond the model's 3"):
        CpuStepRope().adjusted_qk(*parts, step_rope(INTERLEAVED).columns(any_positions(3)))


def test_fmss_tables_are_not_made():
    rope = step_rope(SECTIONED)
    rope.compute_freqs_cis(torch.device("cpu"), 1 << 40)
    assert not rope.cached_freqs


def test_a_model_without_storage_has_frequencies():
    with torch.device("meta"):
        rope = step_rope(SECTIONED)
    assert rope.columns(any_positions()).isfinite().all()


MISMATCHES = {
    "another sum": MRope((16, 24, 23), False),
    "two sections": MRope((32, 32), False),
    "an axis with more than a third": MRope((10, 27, 27), True),
}


@pytest.mark.parametrize("name", list(MISMATCHES))
def test_sections_that_do_not_fit_are_refused_by_name(name: str):
    mrope = MISMATCHES[name]
    mismatch = mrope_mismatch(mrope, HEAD_DIM)
    assert mismatch is not None
    assert mismatch.startswith(f"text_config.mrope_section {[*mrope.sections]}")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_published_sections_fit(name: str):
    assert mrope_mismatch(FAMILIES[name].mrope, HEAD_DIM) is None

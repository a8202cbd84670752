# SPDX-License-Identifier: Apache-2.0
"""The compiled rotation is FMS's own."""

import pytest
import torch
from fms.modules.positions import PixtralRotaryEmbedding, RotaryEmbedding
from torch import nn

from vllm_spyre_mm.model_executor.cpu.kernels.rope import CpuRope, replace_rope

LENGTH = 100
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def rotary(head_dim: int = 64, **more: object) -> RotaryEmbedding:
    made = RotaryEmbedding(head_dim, max_seq_len=LENGTH, **more)
    made.compute_freqs_cis(torch.device("cpu"), LENGTH)
    return made


class Attention(nn.Module):
    def __init__(self, position_encoder: object) -> None:
        super().__init__()
        self.position_encoder = position_encoder


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("scaling", [{}, LLAMA3], ids=["default", "llama3"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_it_rotates_as_fms_does(
    dtype: torch.dtype, head_dim: int, scaling: dict[str, object], tokens: int
):
    """Queries and keys of a fused projection, at positions in any order."""
    torch.manual_seed(0)
    original = rotary(head_dim, scaling=scaling)
    fused = torch.randn(1, tokens, 7, head_dim).to(dtype)
    query, keys, _ = fused.split([4, 2, 1], dim=2)
    positions = torch.randint(0, LENGTH, (1, tokens))
    expected = original.adjusted_qk(query, keys, positions)
    rotated = CpuRope(original).adjusted_qk(query, keys, positions)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for actual, wanted in zip(rotated, expected, strict=True):
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("position", [-1, LENGTH])
def test_a_position_that_the_model_does_not_have_is_refused(position: int):
    parts = torch.randn(2, 1, 3, 1, 64)
    positions = torch.tensor([[0, position, 5]])
    with pytest.raises(IndexError, match=f"1 positions are beyond the model's {LENGTH}"):
        CpuRope(rotary()).adjusted_qk(*parts, positions)


def test_blocks_share_one_table_and_drop_fmss():
    original = rotary()
    blocks = nn.ModuleList([Attention(original), Attention(original)])
    replace_rope(blocks)
    first, second = (block.position_encoder for block in blocks)
    assert type(first) is CpuRope
    assert first is second
    assert not original.cached_freqs


def test_what_is_not_computed_is_left_alone():
    left = [
        rotary(partial_rope=0.5),
        rotary(head_dim=24),
        PixtralRotaryEmbedding(64, 1e4, 32, 4),
        None,
    ]
    blocks = nn.ModuleList([Attention(encoder) for encoder in left])
    replace_rope(blocks)
    assert [block.position_encoder for block in blocks] == left


def test_the_operator_is_what_its_schema_says():
    table = CpuRope(rotary()).table
    query, keys, _ = torch.randn(1, 3, 4, 64).split([2, 1, 1], dim=2)
    torch.library.opcheck(
        torch.ops.spyre_mm.rope.default, (query, keys, torch.tensor([[0, 2, 1]]), table)
    )

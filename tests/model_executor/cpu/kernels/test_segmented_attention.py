# SPDX-License-Identifier: Apache-2.0
"""Attention within segments computes what attention in float64 does for each of them by itself."""

import pytest
import torch

from tests.model_executor.cpu.kernels.test_blocked_attention import exact, qkv, relative_error
from tests.tiers import on_distinct_tiers
from vllm_spyre_mm.model_executor.cpu import segmented
from vllm_spyre_mm.model_executor.cpu.kernels import blocked_attention
from vllm_spyre_mm.model_executor.cpu.kernels.operands import SegmentedRow

CASES: list[tuple[list[int], int, int]] = [
    ([1], 2, 64),
    ([64] * 9, 4, 80),
    ([64, 64, 32, 64, 64, 32, 16], 4, 80),
    ([1, 2, 3, 31, 32, 33, 63, 64, 65, 127], 3, 72),
    ([1100, 5, 900], 2, 64),
    ([40, 4, 700], 2, 24),
    ([70, 70], 1, 2),
    ([30, 50], 2, 128),
]
"""Lengths of the segments, heads and their width."""

IDS = [f"{len(lengths)} segments, heads of {head_dim}" for lengths, _, head_dim in CASES]


def operands(lengths: list[int], heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values; angles as cosines and sines; bounds."""
    positions = sum(lengths)
    parts = qkv(1, positions, heads, head_dim)
    angles = torch.randn(positions, head_dim // 2, generator=torch.Generator().manual_seed(1))
    table = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return (*parts, table, bounds)


def rotated(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Neighbouring pairs as complex numbers, turned; rounded to bf16 as the operator's."""
    turns = torch.view_as_complex(table.double().unflatten(1, (-1, 2)))
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(x.dtype)


def expected(*args: torch.Tensor) -> torch.Tensor:
    query, keys, values, table, bounds = args
    parts = [rotated(query, table), rotated(keys, table), values]
    lengths = bounds.diff().tolist()
    segments = zip(*(part.split(lengths, dim=1) for part in parts), strict=True)
    return torch.cat([exact(*segment) for segment in segments], dim=1)


def attend(*args: torch.Tensor) -> torch.Tensor:
    return torch.ops.spyre_mm.segmented_attention(*args, args[0].shape[-1] ** -0.5)


@on_distinct_tiers
@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_positions_attend_to_those_of_their_segment(case: tuple[list[int], int, int]):
    args = operands(*case)
    attended = attend(*args)
    assert attended.is_contiguous()
    assert attended.dtype == torch.bfloat16
    for mine, theirs in zip(
        attended.split(case[0], dim=1), expected(*args).split(case[0], dim=1), strict=True
    ):
        assert relative_error(mine, theirs) < 5e-3


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_fp32_is_taken(case: tuple[list[int], int, int]):
    args = tuple(part.float() if part.is_floating_point() else part for part in operands(*case))
    assert relative_error(attend(*args), expected(*args)) < 1e-6


def test_nan_stays_in_its_segment():
    query, keys, values, table, bounds = operands([40, 50, 60], 2, 64)
    keys[0, 60, 1, 0] = torch.nan
    is_nan = attend(query, keys, values, table, bounds).isnan().any(-1)[0]
    assert is_nan[40:90, 1].all()
    assert is_nan.sum() == 50


def test_nothing_is_compiled_where_nothing_is_asked_to_be(monkeypatch: pytest.MonkeyPatch):
    """An eager engine needs no C++ compiler."""
    monkeypatch.setattr(blocked_attention, "attend_within_segments", None)
    args = operands([64, 64, 20], 2, 64)
    attended = segmented.attend_segments(SegmentedRow(*args), args[0].shape[-1] ** -0.5)
    assert relative_error(attended, expected(*args)) < 5e-3

# SPDX-License-Identifier: Apache-2.0
"""The sampler's own search finds what PyTorch's does."""

import pytest
import torch
from vllm.v1.sample.sampler import Sampler

from vllm_spyre_mm.upstream.contract import UnsupportedVllmError
from vllm_spyre_mm.worker.sampler import HostSampler


@pytest.fixture
def sampler() -> HostSampler:
    return HostSampler()


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("width", [1, 17, 1024, 3000])
def test_the_largest_logit_is_found(sampler: HostSampler, rows: int, width: int):
    logits = torch.randn(rows, width).to(torch.bfloat16).float()  # some are equal
    found = sampler.greedy_sample(logits)
    assert found.dtype == torch.int64
    assert torch.equal(found, logits.argmax(-1))


@pytest.mark.parametrize("place", [0, 1500, 2999])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_found_as_pytorch_finds_it(
    sampler: HostSampler, value: float, place: int
):
    logits = torch.randn(3, 3000)
    logits[1:, place] = value
    logits[2] = -torch.inf
    logits[2, place] = value
    assert torch.equal(sampler.greedy_sample(logits), logits.argmax(-1))


def test_rows_that_are_apart_are_taken_as_they_are(sampler: HostSampler):
    logits = torch.randn(4, 3000)[:, :1500]
    assert torch.equal(sampler.greedy_sample(logits), logits.argmax(-1))


def test_a_sampler_that_searches_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Sampler, "greedy_sample", staticmethod(lambda logits, rows: logits))
    with pytest.raises(UnsupportedVllmError, match=r"Sampler.greedy_sample takes \(logits, rows\)"):
        HostSampler()

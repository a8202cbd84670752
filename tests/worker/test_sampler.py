# SPDX-License-Identifier: Apache-2.0
"""The sampler's own search finds what PyTorch's does."""

import pytest
import torch
from vllm.v1.sample.sampler import Sampler

from vllm_spyre_mm.vllm_hooks import UnsupportedVllmError
from vllm_spyre_mm.worker.sampler import HostSampler


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_the_largest_logit_is_found(rows: int):
    logits = torch.randn(rows, 1000)
    logits[0, [7, 30]] = 100.0  # the first of equal ones
    found = HostSampler.greedy_sample(logits)
    assert found[0] == 7
    assert found.dtype == torch.int64
    assert torch.equal(found, logits.argmax(-1))


def test_what_is_not_a_number_is_found_as_pytorch_finds_it():
    logits = torch.randn(2, 1000)
    logits[1, 300] = torch.nan
    assert torch.equal(HostSampler.greedy_sample(logits), logits.argmax(-1))


def test_a_sampler_that_searches_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Sampler, "greedy_sample", staticmethod(lambda logits, rows: logits))
    with pytest.raises(UnsupportedVllmError, match=r"Sampler.greedy_sample takes \(logits, rows\)"):
        HostSampler()

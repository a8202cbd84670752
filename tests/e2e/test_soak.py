# SPDX-License-Identifier: Apache-2.0
"""The quick form of ``make soak``: real traffic above capacity, a third of it aborted."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from tests.e2e.serving import Served
from tools.soak.client import Choice, same_answer
from tools.soak.report import faults, report
from tools.soak.soak import Soak, SoakOptions, SoakResult
from tools.soak.state import State

OPTIONS = SoakOptions(requests=250, outstanding=32, pool=16, seed=1)


def test_every_request_ends_in_one_way_and_nothing_is_left(soaked: Served) -> None:
    soak = Soak(soaked.address, soaked.process.pid, OPTIONS)
    result = asyncio.run(soak.run())
    assert not faults(result), report(result)
    assert result.endings.total() == OPTIONS.requests
    assert set(result.endings) == {"right", "left"}
    assert min(result.endings.values()) > OPTIONS.requests / 10
    assert result.evicted > 0, "the encoder cache holds every picture"
    assert {request.kind for request in soak.pool} > {"greedy", "sampled", "maximal", "tiny"}


# -- the soak itself can fail ---------------------------------------------------------------------


def test_an_answer_of_another_request_is_noticed() -> None:
    rows = {"shape": [1, 2], "dtype": "float32", "encoding_format": "base64"}
    zeros, ones = (rows | {"data": data} for data in ("AAAAAAAAAAA=", "AACAPwAAgD8="))
    right = Choice("a red circle", "stop", ones)
    assert same_answer({0: right}, {0: replace(right)})
    for other in (
        replace(right, text="a red circl"),
        replace(right, finish_reason="length"),
        replace(right, embedding=None),
        replace(right, embedding=zeros),
    ):
        assert not same_answer({0: other}, {0: right})
    assert not same_answer({}, {0: right})
    assert not same_answer({0: right, 1: right}, {0: right})


def test_what_is_left_is_noticed() -> None:
    baseline = State({"open files of the engine": 90}, {})
    assert not State({"open files of the engine": 80}, {}).more_than(baseline)
    assert State({"open files of the engine": 91}, {}).more_than(baseline) == [
        "open files of the engine: 90 before, 91 after"
    ]
    stuck = State({"under_way_asked in the engine": 1}, {})
    assert stuck.more_than(stuck) == ["under_way_asked in the engine: 0 before, 1 after"]
    (line,) = State({}, {"dict in Scheduler": 3}).more_than(baseline)
    assert "3 request ids in a dict in Scheduler" in line


@pytest.mark.parametrize(("last", "is_fault"), [(1005, False), (1020, True)])
def test_memory_that_grows_is_noticed(last: int, is_fault: bool) -> None:
    samples = [(ended, {"engine": 1000 if ended < 3500 else last}) for ended in range(0, 4001, 50)]
    result = SoakResult(endings=Counter(right=4000), resident=samples)
    assert bool(faults(result)) == is_fault

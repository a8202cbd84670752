# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/scaling.md are those of the model, with what was measured."""

import re
from pathlib import Path

import pytest

from tools import cost_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
(XEON,) = re.findall(
    r"^## [^\n]*tier amx\n(.*?)(?=^## |\Z)",
    (ROOT / "benchmarks" / "results.md").read_text(),
    re.M | re.S,
)


def test_the_page_has_the_tables() -> None:
    for table in cost_model.tables().split("\n\n"):
        assert table in PAGE


@pytest.mark.parametrize(
    "row",
    [
        f"reads {cost_model.MEASURED.read_bytes / 1e9:.1f} GB/s",
        f"bf16 products {cost_model.MEASURED.flops / 1e12:.2f} TFLOP/s",
        f"| vision tower: 5 tiles, ours | {cost_model.MEASURED.encode_seconds * 1e3:.0f} ms ",
        f"{cost_model.MEASURED.cores} threads",
    ],
)
def test_what_was_measured_is_in_the_results(row: str) -> None:
    assert row in XEON


def test_the_decode_step_is_that_of_sixteen_sequences() -> None:
    (figure,) = re.findall(r"\| decode step: 16 sequences.*? ([\d.]+) times ", XEON)
    assert float(figure) == cost_model.MEASURED.over_floor
    assert cost_model.MODEL.batch == 16

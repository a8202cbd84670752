# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/scaling.md are those of the model, with what was measured."""

import base64
import dataclasses
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
    assert cost_model.ASSUMED.batch == 16


def test_the_page_names_what_is_assumed() -> None:
    """Each constant, so that a reader sees what to put in its place."""
    assumed = cost_model.ASSUMED
    text = " ".join(PAGE.split())
    for words in (
        f"{assumed.text} tokens",
        f"{assumed.answer} tokens",
        f"{assumed.batch} requests",
        f"{assumed.picture_bytes // 1000} kB",
        f"{assumed.processing_seconds} s",
        f"{assumed.utilization} of the cores",
        f"{assumed.host_cores} cores",
        f"{assumed.host_read_bytes / 1e9:.0f} GB/s",
        f"{assumed.store_bytes * 8 / 1e9:.0f} Gbit/s",
        f"{assumed.store_operations} operations",
        f"{assumed.wait_seconds:.0f} s",
        f"{assumed.proxy_chats} chats a second",
    ):
        assert words in text
    assert len(dataclasses.fields(assumed)) == 12
    ahead = PAGE.index("## What a load costs"), PAGE.index("| of one picture")
    assert all(words in " ".join(PAGE[slice(*ahead)].split()) for words in ("EPYC", "base64"))


def test_cores_of_a_full_host_read_no_more_than_its_memory_gives() -> None:
    read = cost_model.core_read_bytes()
    assert read * cost_model.ASSUMED.host_cores <= cost_model.ASSUMED.host_read_bytes
    assert read <= cost_model.MEASURED.read_bytes / cost_model.MEASURED.cores


def test_a_picture_passes_a_proxy_as_base64() -> None:
    encoded = len(base64.b64encode(bytes(cost_model.ASSUMED.picture_bytes)))
    assert cost_model.proxy_bytes() == 3 * encoded

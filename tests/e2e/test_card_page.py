# SPDX-License-Identifier: Apache-2.0
"""The page about cards has the tables of the package, and a decision for every difference."""

import os
import re
from collections.abc import Iterator

import pytest

from tests.e2e.test_docs import DOCS
from vllm_spyre_mm.environment import export_card_environment
from vllm_spyre_mm.model_executor.card.errors import PUBLIC_ERRORS
from vllm_spyre_mm.model_executor.card.limits import KNOWN_MODELS

PAGE = DOCS / "running-on-a-card.md"


def rows(heading: str) -> Iterator[list[str]]:
    """Cells of the tables below a heading, without markup and the tables' heads."""
    text = PAGE.read_text()
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    for table in re.findall(r"^\| .*?\n(?=[^|]|\Z)", section, re.M | re.S):
        for line in table.splitlines()[2:]:
            yield [cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")]


def test_the_known_configurations_are_those_of_the_package() -> None:
    expected = [
        [
            model.name,
            str(known.tensor_parallel_size),
            f"{known.max_model_len:,}",
            str(known.max_num_seqs),
            f"{known.max_batch_tkv:,}",
            "as needed" if known.num_blocks is None else f"{known.num_blocks:,}",
        ]
        for model in KNOWN_MODELS
        for known in model.configurations
    ]
    assert list(rows("Known configurations")) == expected


def test_what_is_set_for_a_card_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {name for name, *_ in rows("What is set for you")}
    for name in listed:
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)
    before = set(os.environ)
    export_card_environment(chunk_size=512, context_len=4096, max_num_seqs=16, max_batch_tkv=65536)
    added = set(os.environ) - before
    assert len(added) >= 4
    assert added <= listed


def test_the_public_texts_are_those_of_the_package() -> None:
    expected = [[error.text, error.meaning, error.cure] for error in PUBLIC_ERRORS]
    assert list(rows("What the card's software says")) == expected


def test_every_difference_is_decided() -> None:
    """Row by row of the comparison with what other projects do."""
    decided = list(rows("Decisions"))
    assert [int(number) for number, _, _ in decided] == [*range(1, 38)]
    assert all(len(decision) > 20 for _, _, decision in decided)

# SPDX-License-Identifier: Apache-2.0
"""pyproject.toml is the one place that says which versions work; the rest agrees with it."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.upstream_matrix import copy_source, declared_versions, pins

ROOT = Path(__file__).parents[1]


def pinned(name: str) -> str:
    """The version in constraints.txt."""
    match = re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert match
    return match[1]


def declared_range() -> Requirement:
    match = re.search(r'"(vllm[<>=][^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert match
    return Requirement(match[1])


def test_the_tested_versions_are_the_declared_ones() -> None:
    versions = declared_versions()
    assert pinned("vllm") in versions
    assert all(version in declared_range().specifier for version in versions)


@pytest.mark.parametrize(
    "page", ["docs/reliability.md", "docs/installation.md"], ids=lambda page: page
)
def test_the_pages_name_the_pinned_version(page: str) -> None:
    assert pinned("vllm") in (ROOT / page).read_text()


def test_no_code_names_a_version_of_vllm() -> None:
    """But for the tests, which pretend others, and for where a fault of vLLM's was seen."""
    files = [ROOT / "Makefile", *(ROOT / "vllm_spyre_mm").rglob("*.py")]
    minor = r"\b(?<!seen_in=\")" + re.escape(".".join(pinned("vllm").split(".")[:2]))
    named = [file.name for file in files if re.search(minor, file.read_text())]
    assert not named


def test_the_matrix_declares_a_candidate_in_its_copy_alone(tmp_path: Path) -> None:
    before = (ROOT / "pyproject.toml").read_text()
    copy_source(tmp_path / "copy", "0.99.1")
    assert '"vllm==0.99.1"' in (tmp_path / "copy" / "pyproject.toml").read_text()
    assert (tmp_path / "copy" / "vllm_spyre_mm" / "platform.py").exists()
    assert (ROOT / "pyproject.toml").read_text() == before
    copy_source(tmp_path / "pinned", pinned("vllm"))
    assert (tmp_path / "pinned" / "pyproject.toml").read_text() == before


def test_all_pins_hold_for_the_pinned_version_and_pytorchs_for_a_candidate() -> None:
    assert f"vllm=={pinned('vllm')}" in pins(pinned("vllm"))
    candidate = pins("0.99.1")
    assert "vllm==0.99.1" in candidate
    assert f"torch=={pinned('torch')}" in candidate
    assert not any(line.startswith("transformers==") for line in candidate)

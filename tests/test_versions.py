# SPDX-License-Identifier: Apache-2.0
"""pyproject.toml is the one place that says which versions work; the rest agrees with it."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tools.upstream_matrix import (
    GROUPS,
    Environment,
    MatrixError,
    copy_source,
    counted,
    declared_environments,
    make,
    pins,
    run,
)

ROOT = Path(__file__).parents[1]


def load(file: Path) -> dict[str, Any]:
    return tomllib.loads(file.read_text())


PYPROJECT = load(ROOT / "pyproject.toml")
PROJECT = PYPROJECT["project"]


def pinned(name: str) -> str:
    """The version in constraints.txt."""
    match = re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert match
    return match[1]


def declared_range(name: str) -> Requirement:
    (line,) = (each for each in PROJECT["dependencies"] if Requirement(each).name == name)
    return Requirement(line)


def test_the_tested_versions_are_in_the_declared_ranges() -> None:
    """And the bounds are theirs: nothing older or newer is declared than what is tested."""
    environments = declared_environments()
    for name in ("torch", "vllm"):
        versions = [Version(getattr(each, name)) for each in environments]
        assert versions == sorted(versions), "oldest first"
        bounds = {bound.operator: bound.version for bound in declared_range(name).specifier}
        assert Version(bounds[">="]).release[:2] == versions[0].release[:2]
        major, minor = versions[-1].release[:2]
        assert bounds["<"] == f"{major}.{minor + 1}"


def test_the_tested_pythons_are_the_declared_ones() -> None:
    pythons = sorted({each.python for each in declared_environments()})
    classifiers = [each.rpartition(":: ")[2] for each in PROJECT["classifiers"] if "Python" in each]
    assert classifiers == pythons
    newest = int(pythons[-1].removeprefix("3."))
    assert PROJECT["requires-python"] == f">={pythons[0]},<3.{newest + 1}"


def test_the_tools_check_for_the_oldest_python() -> None:
    oldest = min(each.python for each in declared_environments())
    assert PYPROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"


def test_one_environment_is_the_pinned_one() -> None:
    (environment,) = (each for each in declared_environments() if each.name == "pinned")
    assert (environment.torch, environment.vllm) == (pinned("torch"), pinned("vllm"))
    assert f"PYTHON ?= python{environment.python}\n" in (ROOT / "Makefile").read_text()
    assert len(pins(environment)) > 100


@pytest.mark.parametrize("page", ["README.md", "docs/installation.md", "docs/compatibility.md"])
def test_the_pages_name_the_oldest_and_the_newest(page: str) -> None:
    text = (ROOT / page).read_text()
    assert all(each.python in text for each in declared_environments())
    for name in ("torch", "vllm"):
        versions = [getattr(each, name) for each in declared_environments()]
        for version in (versions[0], versions[-1]):
            assert re.search(rf"\b{re.escape(version.rpartition('.')[0])}\b", text)


def test_the_page_of_results_has_what_is_declared() -> None:
    """Each PyTorch with its vLLM, and each Python with one of these."""
    text = (ROOT / "docs" / "compatibility.md").read_text()
    rows = re.findall(r"^\| (3\.\d+)\.\d+ \| ([\d.]+)\S* \| ([\d.]+) \|", text, re.M)
    declared = declared_environments()
    assert {(each.torch, each.vllm) for each in declared} <= {(row[1], row[2]) for row in rows}
    assert {each.python for each in declared} <= {row[0] for row in rows}


def test_differences_between_releases_have_one_place() -> None:
    """No other module names a release of vLLM, or asks for the installed one to compare it."""
    minors = {each.vllm.rpartition(".")[0] for each in declared_environments()}
    minor = re.compile(rf"\b(?:{'|'.join(map(re.escape, minors))})\b")
    for file in [ROOT / "Makefile", *(ROOT / "vllm_spyre_mm").rglob("*.py")]:
        # A fault that is mended says in which release it was seen last.
        lines = [line for line in file.read_text().splitlines() if "seen_in=" not in line]
        assert file.name == "releases.py" or not minor.search("\n".join(lines)), file


def test_a_candidate_is_declared_in_its_copy_alone(tmp_path: Path) -> None:
    before = (ROOT / "pyproject.toml").read_text()
    copy = copy_source(tmp_path / "copy", declared=False)
    dependencies = load(copy / "pyproject.toml")["project"]["dependencies"]
    assert all("99.1" in Requirement(each).specifier for each in dependencies)
    assert (copy / "vllm_spyre_mm" / "platform.py").exists()
    assert (ROOT / "pyproject.toml").read_text() == before
    copy_source(tmp_path / "declared", declared=True)
    assert (tmp_path / "declared" / "pyproject.toml").read_text() == before


def test_what_is_not_pinned_has_its_own_versions_and_the_pinned_fms() -> None:
    candidate = Environment("candidate", "3.12", "2.99.0", "0.99.1")
    assert not candidate.is_declared()
    assert pins(candidate) == [
        "torch==2.99.0",
        "vllm==0.99.1",
        f"ibm-fms=={pinned('ibm-fms')}",
    ]


def test_a_python_that_is_not_there_is_named() -> None:
    with pytest.raises(MatrixError, match=r"there is no python2\.99 on the path"):
        make(Environment("none", "2.99", "2.99.0", "0.99.1"))


def test_a_command_that_fails_says_why() -> None:
    script = "print('FAILED test_this'); print('1 failed, 2 passed in 3 s'); raise SystemExit(1)"
    with pytest.raises(MatrixError) as raised:
        run([sys.executable, "-c", script])
    assert str(raised.value).splitlines()[0] == "FAILED test_this"
    assert counted(str(raised.value)) == "1 failed, 2 passed"


def test_a_run_without_an_end_has_failed() -> None:
    assert counted("Fatal Python error: Aborted") == "failed: Fatal Python error: Aborted"


def test_every_group_has_files() -> None:
    for paths in GROUPS.values():
        assert all((ROOT / path).exists() for path in paths)

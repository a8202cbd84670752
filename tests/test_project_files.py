# SPDX-License-Identifier: Apache-2.0
"""What stands beside the code for those who join, report or cite agrees with the code."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_spyre_mm.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
TEMPLATES = [*FORMS, ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md"]
TEXTS = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *TEMPLATES]


def by_name(value: Path) -> str:
    return value.name


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_the_hook_before_a_commit_is_make_lint() -> None:
    """Not a list of checkers of its own, which could become another one."""
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    (hook,) = repository["hooks"]
    assert (hook["entry"], hook["language"]) == ("make lint", "system")
    assert hook["always_run"]
    assert not hook["pass_filenames"]  # make would take them for targets


def test_the_citation_is_of_this_project() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert "version" not in citation  # it would be a second place
    assert citation["title"] == PROJECT["name"]
    assert citation["abstract"] == PROJECT["description"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]


def test_the_changelog_is_kept_for_this_version() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    number, development, _ = PROJECT["version"].partition(".dev0")
    date = "unreleased" if development else r"\d{4}-\d\d-\d\d"
    assert re.fullmatch(re.escape(number) + f" - {date}", headings[0])
    for heading in headings[1:]:
        assert re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", heading)


def test_the_version_stands_in_one_place() -> None:
    """Besides the history, and the tag of the image, which test_kubernetes.py holds to it."""
    others = [":!CHANGELOG.md", ":!deploy", ":!docs/kubernetes.md"]
    command = ["git", "grep", "-lF", PROJECT["version"], "--", *others]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout.split() == ["pyproject.toml"]


def test_the_command_says_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == version(PROJECT["name"])


@pytest.mark.parametrize("page", ["README.md", "docs/installation.md"])
def test_vllm_is_installed_in_the_version_that_is_pinned(page: str) -> None:
    given = set(re.findall(r"VLLM_VERSION_OVERRIDE=([\d.]+)", (ROOT / page).read_text()))
    (version_of_vllm,) = given
    assert f"vllm=={version_of_vllm}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_there_are_three_forms() -> None:
    assert [form.stem for form in FORMS] == ["bug", "feature", "model_request"]


@pytest.mark.parametrize("form", FORMS, ids=by_name)
def test_a_form_can_be_filled_in(form: Path) -> None:
    """What GitHub asks of a form; one that lacks something is not offered at all."""
    content = load(form)
    assert {"name", "description", "body"} <= set(content)
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids)
    for field in fields:
        assert field["type"] in ("input", "textarea", "dropdown", "checkboxes")
        assert field["attributes"]["label"]
    assert any(field.get("validations", {}).get("required") for field in fields)


@pytest.mark.parametrize("text", TEXTS, ids=by_name)
def test_what_a_text_names_exists(text: Path) -> None:
    """Targets of make, subcommands, and files of the repository."""
    content = text.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", content, re.M)) <= targets
    assert set(re.findall(r"`vllm-spyre-mm ([a-z-]+)", content)) <= set(COMMANDS)
    files = re.findall(r"\b(?:(?:docs|tests)/)?[\w/-]+\.(?:md|py|toml|txt)\b", content)
    for file in files:
        assert (ROOT / file).exists() or (ROOT / "vllm_spyre_mm" / file).exists(), file


def test_contributing_names_the_python_and_the_targets() -> None:
    assert f"Python {PYPROJECT['tool']['upstream']['pinned']['python']}," in CONTRIBUTING
    for target in ("setup", "test", "lint"):
        assert re.search(rf"(?:^|`)make {target}\b", CONTRIBUTING, re.M)


def runnable_commands() -> list[str]:
    blocks = re.findall(r"^<!-- runnable -->\n```\n(.*?)^```$", CONTRIBUTING, re.M | re.S)
    return [command for block in blocks for command in block.splitlines()]


def test_the_commands_for_one_test_are_shown() -> None:
    assert len(runnable_commands()) == 2


@pytest.mark.parametrize("command", runnable_commands())
def test_a_command_runs_as_it_stands(command: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command.split(), cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout)

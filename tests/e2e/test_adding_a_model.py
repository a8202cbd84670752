# SPDX-License-Identifier: Apache-2.0
"""The walk-through of docs/adding-a-model.md, step by step: a mapping of one's own is served."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_spyre_mm.cli import main
from vllm_spyre_mm.multimodal import mm_mappings

ROOT = Path(__file__).parents[2]
STEP = re.compile(r"^<!-- step(?:: (?P<file>\S+))? -->\n```python\n(?P<code>.*?)^```$", re.M | re.S)
KEY = "transformers.LlavaConfig"

CONFTEST = f"""
import tests  # as the repository's own
from my_llava import MyLlava
from vllm_spyre_mm.multimodal.mm_mappings import MM_CFG_MAPPING
MM_CFG_MAPPING["{KEY}"] = (MyLlava,)
"""
"""Stands for step 4, which edits the package."""


@pytest.fixture(scope="module")
def steps() -> list[tuple[str | None, str]]:
    page = (ROOT / "docs" / "adding-a-model.md").read_text()
    return [(match["file"], match["code"]) for match in STEP.finditer(page)]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str | None, str]]
) -> Iterator[Path]:
    """The files that the page says to write."""
    path = tmp_path_factory.mktemp("mine")
    (path / "conftest.py").write_text(CONFTEST)
    for file, code in steps:
        if file is not None:
            (path / file).write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        yield path


def test_the_page_has_these_steps(steps: list[tuple[str | None, str]]) -> None:
    assert [file for file, _ in steps] == [None, "my_llava.py", None, "test_my_llava.py", None]


def test_the_steps_run_in_order(
    folder: Path,
    steps: list[tuple[str | None, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    features, _, compare, _, serve = (code for _, code in steps)
    namespace: dict[str, Any] = {}
    monkeypatch.setitem(mm_mappings.MM_CFG_MAPPING, KEY, ())
    exec(features, namespace)
    assert "torch.Size([36, 128])" in capsys.readouterr().out
    assert main(["models", str(namespace["checkpoint"])]) == 1
    assert "'llava' is not supported" in capsys.readouterr().err
    exec(compare, namespace)
    mapping = namespace["MyLlava"]
    assert mapping.__module__ == "my_llava"
    monkeypatch.setitem(mm_mappings.MM_CFG_MAPPING, KEY, (mapping,))
    assert main(["models", str(namespace["checkpoint"])]) == 0
    assert "served by MyLlava" in capsys.readouterr().out
    exec(serve, namespace)
    assert "torch.Size([36, 128])" in capsys.readouterr().out


def test_the_suite_of_the_page_passes(folder: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_llava.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    passed = re.search(r"(\d+) passed", finished.stdout)
    assert passed is not None
    assert int(passed[1]) > 30


def test_the_page_is_what_the_package_has(folder: Path) -> None:
    """The mapping of the page computes what the package's own does, from nearly the same lines."""
    own = (ROOT / "vllm_spyre_mm/multimodal/mm_mappings/llava.py").read_text()
    lines = (folder / "my_llava.py").read_text().splitlines()
    code = [line.strip() for line in lines if "def " not in line and '"""' not in line]
    assert all(line in own for line in code if not line.startswith("class "))

# SPDX-License-Identifier: Apache-2.0
"""Which file is torchvision's operator library. That the import works, every test shows."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from vllm_spyre_mm.compat import _load_op_library


@pytest.mark.parametrize("name", ["_C", "_C_stable"])
@pytest.mark.parametrize("suffix", EXTENSION_SUFFIXES)
def test_the_library_is_found_by_either_name(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schemas that were declared beside a library that loads later would end the process."""
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    library = tmp_path / f"{name}{suffix}"
    library.touch()
    assert _load_op_library(tmp_path)
    assert loaded == [str(library)]


def test_a_library_that_is_no_library_does_not_load(tmp_path: Path) -> None:
    (tmp_path / f"_C_stable{EXTENSION_SUFFIXES[0]}").touch()
    assert not _load_op_library(tmp_path)


def test_there_may_be_no_library(tmp_path: Path) -> None:
    (tmp_path / "image.so").touch()
    assert not _load_op_library(tmp_path)

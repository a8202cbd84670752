# SPDX-License-Identifier: Apache-2.0
"""Each fix says what it mends, and is left out where it is switched off or not needed."""

import importlib
import importlib.metadata
import pkgutil
from typing import Any

import pytest

from vllm_spyre_mm import vllm_fixes
from vllm_spyre_mm.vllm_fixes import Fault, media

MODULES = {
    each.name: importlib.import_module(f"{vllm_fixes.__name__}.{each.name}")
    for each in pkgutil.iter_modules(vllm_fixes.__path__)
}
PARTS = ("fault", "media_connector", "media_errors", "video_media")
"""Parts of fixes."""

FIXES: dict[str, Any] = {name: module for name, module in MODULES.items() if name not in PARTS}
VLLM = importlib.metadata.version("vllm")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fixes that are installed, which do nothing."""
    names: list[str] = []
    for name, module in FIXES.items():
        if hasattr(module, "install"):
            monkeypatch.setattr(module, "install", lambda name=name: names.append(name))
    return names


@pytest.mark.parametrize("name", FIXES)
def test_a_fix_says_what_it_mends_and_what_it_replaces(name: str) -> None:
    fix = FIXES[name]
    assert fix.FAULT.sentence.endswith(".")
    assert fix.FAULT.seen_in
    assert all(replaced.startswith("vllm.") for replaced in fix.REPLACED)


def test_all_are_installed_by_default(installed: list[str]) -> None:
    vllm_fixes.install()
    assert set(installed) == {name for name, fix in FIXES.items() if hasattr(fix, "install")}


def test_none_is_installed_where_they_are_switched_off(
    installed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPYRE_MM_VLLM_FIXES", "0")
    vllm_fixes.install()
    assert not installed
    assert not any(fix.FAULT.applies() for fix in FIXES.values())


def test_a_fix_is_left_out_where_vllm_has_mended_it(
    installed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "FAULT", Fault("A fault.", seen_in="0.31.0", mended_in=VLLM))
    vllm_fixes.install()
    assert "media" not in installed
    assert len(installed) > 4


@pytest.mark.parametrize(
    ("mended_in", "applies"), [(None, True), ("0.1", False), (VLLM, False), ("999.0", True)]
)
def test_a_fault_applies_before_the_release_without_it(
    mended_in: str | None, applies: bool
) -> None:
    assert Fault("A fault.", seen_in="0.31.0", mended_in=mended_in).applies() == applies


@pytest.mark.parametrize(("value", "expected"), [("", True), ("1", True), ("0", False)])
def test_the_switch(value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPYRE_MM_VLLM_FIXES", value)
    assert Fault("A fault.", seen_in="0.31.0").applies() == expected


def test_another_value_of_the_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPYRE_MM_VLLM_FIXES", "no")
    with pytest.raises(ValueError, match="SPYRE_MM_VLLM_FIXES='no' is neither 0 nor 1"):
        vllm_fixes.install()

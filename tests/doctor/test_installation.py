# SPDX-License-Identifier: Apache-2.0
"""Broken installations are named, with what to do; each is really broken, or looks so to Python."""

import platform
from pathlib import Path

import pytest
from vllm.utils.torch_utils import available_cpu_count

from tests.doctor.findings import only, pretend_installed
from vllm_spyre_mm.doctor import host, installation


def test_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(installation.python()).level == "ok"
    monkeypatch.setattr(platform, "python_version", lambda: "3.13.1")
    finding = only(installation.python())
    assert (finding.level, finding.do) == ("error", "use a Python<3.13,>=3.11")
    assert "Python 3.13.1 is not Python<3.13,>=3.11" in finding.says


def test_the_versions_here() -> None:
    finding = only(installation.versions())
    assert finding.level == "ok"
    assert "vllm 0.32.0" in finding.says


def test_every_wrong_version_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(tmp_path, "vllm", "0.31.1")
    pretend_installed(tmp_path, "ibm-fms", "1.2.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    first, second = installation.versions()
    assert first.level == second.level == "error"
    assert "it works with vllm<0.34,>=0.32.0, but 0.31.1 is installed" in first.says
    assert "it works with ibm-fms<1.14,>=1.13.1, but 1.2.0 is installed" in second.says
    assert "docs/installation.md" in first.do


def test_a_version_that_nobody_tried_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it has what is leant on, the check of the hooks says."""
    pretend_installed(tmp_path, "vllm", "0.35.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = only(installation.versions())
    assert finding.level == "warning"
    assert finding.says == ("vllm 0.35.1 is newer than any that was tested (vllm<0.34,>=0.32.0)")


def test_the_environment_excludes_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_PLUGINS", "VLLM_TARGET_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    assert only(installation.plugin()).level == "ok"
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    assert "VLLM_TARGET_DEVICE=cpu" in only(installation.plugin()).says
    monkeypatch.setenv("VLLM_PLUGINS", "another,spyre")
    finding = only(installation.plugin())
    assert finding.level == "error"
    assert "VLLM_PLUGINS='another,spyre' does not name spyre_mm" in finding.says


def test_two_platforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(tmp_path, "sendnn-inference", "2.6.3")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert "VLLM_PLUGINS=spyre_mm" in only(installation.plugin()).do
    monkeypatch.setenv("VLLM_PLUGINS", "spyre_mm")
    assert only(installation.plugin()).level == "ok"


@pytest.mark.usefixtures("fresh_probes")
def test_a_torchvision_that_does_not_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise ImportError('libcudart.so.13')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    finding = only(installation.torchvision())
    assert finding.level == "error"
    assert finding.says == (
        "torchvision does not import: its process ended with ImportError: libcudart.so.13"
    )


@pytest.mark.usefixtures("fresh_probes")
def test_a_vllm_that_kills_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A native library of another build may do so; the doctor lives on and says it."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    finding = only(installation.hooks())
    assert finding.level == "error"
    assert finding.says == "vLLM with the platform fails: its process ended with status -6"


@pytest.mark.usefixtures("fresh_probes")
def test_hooks_of_a_platform_that_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    finding = only(installation.hooks())
    assert finding.level == "error"
    assert "vLLM's platform is vllm.platforms." in finding.says
    assert host.available_cores() == available_cpu_count(), "vLLM counts them all the same"

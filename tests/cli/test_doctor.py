# SPDX-License-Identifier: Apache-2.0
"""``vllm-spyre-mm doctor`` as users run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doctor.findings import pretend_installed
from vllm_spyre_mm import doctor
from vllm_spyre_mm.cli import main


def run_doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_spyre_mm.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def test_a_good_installation_and_a_good_model(demo_checkpoint: Path) -> None:
    done = run_doctor(str(demo_checkpoint))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for check in ("python", "versions", "hooks", "compiler", "memory", "files", "weights"):
        assert any(line.split()[:2] == ["ok", check] for line in lines), check
    assert ": 0 errors, " in lines[-1]


def test_everything_that_is_broken_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another vLLM, no compiler, a card's image without its setup, and no model; the exit status
    says so to a script."""
    pretend_installed(tmp_path, "vllm", "0.31.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FLEX_COMPUTE", "SENTIENT")
    done = run_doctor("--json", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    findings = json.loads(done.stdout)
    errors = {finding["check"] for finding in findings if finding["level"] == "error"}
    assert errors >= {"versions", "hooks", "compiler", "model"}
    assert errors >= {"torch_sendnn", "devices", "senlib"}
    assert all(finding["do"] for finding in findings if finding["level"] != "ok")
    (hooks,) = (finding for finding in findings if finding["check"] == "hooks")
    assert "works with vllm<0.34,>=0.32.0, but 0.31.0 is installed" in hooks["says"]


def test_a_check_that_breaks_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("nobody thought of this")

    from vllm_spyre_mm.doctor import host, installation

    for module, names in (
        (installation, ("torchvision", "hooks", "versions", "plugin")),
        (host, ("backend", "compiler", "cpu", "threads", "memory")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, broken if name == "cpu" else lambda: iter(()))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "error    cpu          this could not be checked: ZeroDivisionError: nobody" in printed
    assert "-> correct the findings above first" in printed
    assert isinstance(next(doctor.examine()), doctor.Finding)

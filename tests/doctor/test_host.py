# SPDX-License-Identifier: Apache-2.0
"""What is missing on the host is named: a compiler, the card's software, cores."""

import stat
from pathlib import Path

import pytest

from tests.doctor.findings import only, pretend_installed
from vllm_spyre_mm import host_memory
from vllm_spyre_mm.doctor import host
from vllm_spyre_mm.host_memory import HostMemory

pytestmark = pytest.mark.usefixtures("fresh_probes")


def test_this_host_can_compile() -> None:
    assert only(host.compiler()).level == "ok"
    assert only(host.cpu()).level in ("ok", "warning")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    finding = only(host.compiler())
    assert finding.level == "error"
    assert finding.says.startswith("no C++ compiler: ")
    assert "--enforce-eager" in finding.do


def test_a_compiler_without_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "my-g++"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--version*|*-v*) echo "g++ (GCC) 13.2.0"; exit 0;; esac\n'
        'echo "program.cpp:1:10: fatal error: Python.h: No such file or directory" >&2\nexit 1\n'
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    finding = only(host.compiler())
    assert finding.level == "error"
    assert "cannot make a library: program.cpp:1:10: fatal error: Python.h" in finding.says


def test_the_cards_software_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torch_sendnn"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = only(host.backend())
    assert (finding.level, finding.says) == (
        "error",
        "torch_sendnn is installed and lacks warmup_mode",
    )
    host.probe.cache_clear()
    (package / "__init__.py").write_text("raise OSError('libsenlib.so')\n")
    finding = only(host.backend())
    assert finding.says.endswith("not import: its process ended with OSError: libsenlib.so")
    host.probe.cache_clear()
    (package / "__init__.py").write_text("def warmup_mode(): ...\n")
    assert only(host.backend()).says == "the card: torch_sendnn imports, and sees VLLM_DT_*"


def test_the_cards_software_is_imported_too_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch imports what registers itself as a device's backend, before anything is set."""
    package = tmp_path / "torch_sendnn"
    package.mkdir()
    (package / "__init__.py").write_text("def warmup_mode(): ...\ndef load(): ...\n")
    pretend_installed(tmp_path, "torch_sendnn", "1.3.1")
    entry_points = tmp_path / "torch_sendnn-1.3.1.dist-info" / "entry_points.txt"
    entry_points.write_text("[torch.backends]\nsendnn = torch_sendnn:load\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = only(host.backend())
    assert finding.level == "error"
    assert "before the platform has set VLLM_DT_*" in finding.says
    assert finding.do == "set TORCH_DEVICE_BACKEND_AUTOLOAD=0"
    host.probe.cache_clear()
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert only(host.backend()).level == "ok"


def test_the_cards_software_changes_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "torch_sendnn"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import os\nos.environ['VLLM_DT_CHUNK_LEN'] = '64'\ndef warmup_mode(): ...\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "does not keep its four VLLM_DT_*" in only(host.backend()).says


@pytest.mark.parametrize(
    ("cores", "level", "do"),
    [(8, "warning", "unset OMP_NUM_THREADS"), (1, "warning", "OMP_NUM_THREADS=1: "), (2, "ok", "")],
)
def test_threads_against_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, level: str, do: str
) -> None:
    found = {"host": {"threads": 2}, "hooks": {"cores": cores}}
    monkeypatch.setattr(host, "probe", found.__getitem__)
    finding = only(host.threads())
    assert (finding.level, finding.says) == (level, f"2 threads for {cores} cores")
    assert do in finding.do


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "host_memory", lambda: HostMemory(8 << 30, 1 << 30))
    finding = only(host.memory())
    assert finding.level == "warning"
    assert finding.says == "1.0 of 8.0 GiB are free"

# SPDX-License-Identifier: Apache-2.0
"""Tests the package with each vLLM that it declares, each in an environment of its own.

``make upstream`` takes the versions of ``[tool.upstream]`` in ``pyproject.toml``; versions named on
the command line are candidates, which are tried although the package does not declare them.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".venv-upstream"

BUILD_TOOLS = ("setuptools>=77,<81", "setuptools-scm", "setuptools-rust", "wheel", "packaging")
"""What vLLM is built with besides PyTorch, of which its own build would fetch another one."""

KEPT = ("torch", "torchvision", "ibm-fms", "numpy")
"""Whose pinned versions hold for every vLLM; it has ranges of its own for the rest."""

TESTS = (
    "tests/upstream",
    "tests/frontend",
    "tests/vllm_fixes",
    "tests/scheduler",
    "tests/worker",
    "tests/e2e/test_parity.py",
)
"""Every hook's contract, the scheduler's overrides and the runner, and answers of real engines."""


class MatrixError(RuntimeError):
    """A version does not install, or its tests fail."""


def declared_versions() -> list[str]:
    """The versions that the tests pass with, as ``pyproject.toml`` says."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["upstream"]["vllm"]


def main() -> int:
    """Test each version; the exit status is 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", help="candidates (default: the declared versions)")
    results: dict[str, str] = {}
    for version in parser.parse_args().versions or declared_versions():
        print(f"== vLLM {version}", flush=True)
        try:
            results[version] = test(version)
        except MatrixError as error:
            results[version] = f"FAILED: {error}"
    for version, result in results.items():
        print(f"vLLM {version:10} {result}")
    return int(any(result.startswith("FAILED") for result in results.values()))


def test(version: str) -> str:
    """Install one version with the package and run the tests; what pytest says at the end.

    Raises:
        MatrixError: with the last lines that say why.
    """
    folder = ENVIRONMENTS / version
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "bin" / "python"
    run([sys.executable, "-m", "venv", str(folder)])
    source = folder / "source"
    copy_source(source, version)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pins(version)))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    run([*pip, *BUILD_TOOLS, "torch"])
    build = ["--no-build-isolation", "--no-binary", "vllm", "--editable", f"{source}[test]"]
    run([*pip, *build], VLLM_VERSION_OVERRIDE=version, VLLM_TARGET_DEVICE="empty")
    pytest = [str(python), "-m", "pytest", "--quiet"]
    if version not in declared_versions():
        pytest += ["--ignore", "tests/upstream/test_contract.py"]  # it is about what is declared
    passed, failed = [], []
    for tests in TESTS:  # a process each
        try:
            output = run([*pytest, tests], folder=source)
            passed.append(f"{tests}: {output.strip().splitlines()[-1]}")
        except MatrixError as error:
            failed.append(f"{tests}: {error}")
    if failed:
        raise MatrixError("\n  ".join(failed))
    return "\n  ".join(["passed", *passed])


def copy_source(target: Path, version: str) -> None:
    """Copy the checkout; a candidate becomes what the copy declares, so that it is not refused."""
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, target, ignore=ignored)
    if version in declared_versions():
        return
    pyproject = target / "pyproject.toml"
    text, count = re.subn(r'"vllm[<>=][^"]*"', f'"vllm=={version}"', pyproject.read_text())
    assert count == 1, "pyproject.toml names vLLM's range once"
    pyproject.write_text(text)


def pins(version: str) -> list[str]:
    """Constraints: all that are pinned for the pinned version, for another those that must hold."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    if f"vllm=={version}" in lines:
        return lines
    return [f"vllm=={version}", *(line for line in lines if line.partition("==")[0] in KEPT)]


def run(command: list[str], folder: Path = ROOT, **environment: str) -> str:
    """Run a command to its end; its standard output.

    Raises:
        MatrixError: it failed.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=inherited | environment, capture_output=True, text=True
    )
    if done.returncode:
        lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
        telling = [line for line in lines if line.startswith(("ERROR", "FAILED", "E  "))]
        raise MatrixError("\n    ".join((telling or lines)[-12:]))
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())

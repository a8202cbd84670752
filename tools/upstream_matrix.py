# SPDX-License-Identifier: Apache-2.0
"""Tests the package in each environment that it declares: a Python, a PyTorch and a vLLM.

``make upstream`` makes the environments of ``[tool.upstream]`` in ``pyproject.toml``, with pip as
it is configured: PyTorch is the build that its index has. What is named on the command line is
tested alone. An environment that is there already is tested with ``--reuse``, a release that is not
declared with ``--candidate``. The table at the end is that of ``docs/compatibility.md``.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".venv-upstream"

BUILD_TOOLS = ("setuptools>=77,<81", "setuptools-scm", "setuptools-rust", "wheel", "packaging")
"""What vLLM is built with besides PyTorch, of which its own build would fetch another one."""

BOUNDED = ("vllm", "torch", "torchvision", "ibm-fms", "transformers")
"""Requirements whose upper bound a candidate may be beyond."""

SHOWN = ("torch", "vllm", "transformers", "ibm-fms")
"""Distributions whose versions the table shows."""

GROUPS = {
    "hooks": ("tests/upstream", "tests/frontend", "tests/vllm_fixes"),
    "scheduler": ("tests/scheduler",),
    "runner": ("tests/worker",),
    "mappings": ("tests/multimodal",),
    "compiler": (
        "tests/model_executor/cpu/test_compile.py",
        "tests/model_executor/cpu/test_eager_graph.py",
        "tests/model_executor/cpu/test_shared_graph.py",
        "tests/model_executor/cpu/test_tier.py",
        "tests/model_executor/cpu/test_torch_internals.py",
    ),
    "card": ("tests/e2e/test_card_conformance.py", "tests/e2e/test_card_contract.py"),
    "engines": ("tests/e2e/test_parity.py",),
}
"""What is tested, a process of pytest for each: the card is its stand-in, the engines are real."""

PROCESSES = ("-p", "tests.processes", "-n", "2", "--dist", "loadfile")

LIMIT = 3600
"""Seconds that a group may take."""


class MatrixError(RuntimeError):
    """An environment cannot be made, or its tests fail."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What is installed together.

    Attributes:
        name: of the environment and its folder.
        python: minor version.
        torch: version.
        vllm: version.
    """

    name: str
    python: str
    torch: str
    vllm: str

    def is_declared(self) -> bool:
        """Whether ``pyproject.toml`` says that the tests pass in it."""
        return self in declared_environments()


def declared_environments() -> list[Environment]:
    """Those of ``pyproject.toml``, oldest first."""
    rows = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["upstream"]
    return [Environment(name, **versions) for name, versions in rows.items()]


def main() -> int:
    """Test each environment; the exit status is 1 if one of them fails."""
    declared = {each.name: each for each in declared_environments()}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(declared)} (default: all)")
    parser.add_argument(
        "--candidate",
        metavar="PACKAGE=VERSION",
        action="append",
        default=[],
        help="test the newest environment with another python, torch or vllm",
    )
    parser.add_argument(
        "--reuse",
        metavar="FOLDER",
        action="append",
        default=[],
        type=Path,
        help="test in this virtual environment; the package in it is replaced",
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    arguments = parser.parse_args()
    names = arguments.names
    if unknown := [name for name in names if name not in declared]:
        parser.error(f"no environment {unknown[0]!r}: there are {', '.join(declared)}")
    if not (names or arguments.candidate or arguments.reuse):
        names = list(declared)
    wanted: list[Environment | Path] = [declared[name] for name in names]
    if arguments.candidate:
        versions = dict(each.split("=") for each in arguments.candidate)
        wanted.append(replace(declared["newest"], name="candidate", **versions))
    wanted += arguments.reuse
    rows = list(filter(None, (examine(each, arguments.groups) for each in wanted)))
    print(*heading(arguments.groups), *rows, sep="\n")
    return int(len(rows) < len(wanted) or bool(re.search("failed|error", "".join(rows))))


def examine(wanted: Environment | Path, groups: list[str]) -> str | None:
    """Make or reuse an environment and test in it; its line of the table, None without one."""
    print(f"== {wanted}", flush=True)
    try:
        folder = make(wanted) if isinstance(wanted, Environment) else reuse(wanted)
        return row(folder, [test(folder, group) for group in groups])
    except MatrixError as error:
        print(error, flush=True)
        return None


def make(environment: Environment) -> Path:
    """Make an environment anew, with the package in it.

    Raises:
        MatrixError: there is no such Python, or something does not install.
    """
    folder = ENVIRONMENTS / environment.name
    shutil.rmtree(folder, ignore_errors=True)
    interpreter = shutil.which(f"python{environment.python}")
    if interpreter is None:
        raise MatrixError(f"there is no python{environment.python} on the path")
    run([interpreter, "-m", "venv", str(folder)])
    source = copy_source(source_of(folder), declared=environment.is_declared())
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pins(environment)))
    pip = [*python_of(folder), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    run([*pip, *BUILD_TOOLS, "torch"])
    build = ["--no-build-isolation", "--no-binary", "vllm", "--editable", f"{source}[test]"]
    run([*pip, *build], VLLM_VERSION_OVERRIDE=environment.vllm, VLLM_TARGET_DEVICE="empty")
    return folder if environment.is_declared() else reuse(folder)


def reuse(folder: Path) -> Path:
    """Put the package into an environment that has all that it needs, whatever the versions."""
    source = copy_source(source_of(folder), declared=True)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--ignore-requires-python"]
    run([*python_of(folder), "-m", "pip", "install", *options, "--editable", str(source)])
    return folder


def test(folder: Path, group: str) -> str:
    """Run a group of tests; how many passed and failed. What failed is printed."""
    command = [*python_of(folder), "-m", "pytest", "--quiet", *PROCESSES, *GROUPS[group]]
    try:
        output = run(command, folder=source_of(folder))
    except MatrixError as error:
        output = str(error)
        print(output, flush=True)
    print(f"{group}: {counted(output)}", flush=True)
    return counted(output)


def counted(output: str) -> str:
    """How many tests passed, failed and were left out, of pytest's last line."""
    last = output.strip().splitlines()[-1]
    counts = re.findall(r"\d+ (?:passed|skipped|xfailed|failed|errors?)", last)
    return ", ".join(counts) or f"failed: {last}"


def source_of(folder: Path) -> Path:
    """Where the copy of the checkout is that an environment has the package from."""
    return ENVIRONMENTS / f"source-{folder.name}"


def copy_source(target: Path, *, declared: bool) -> Path:
    """Copy the checkout; for pip to install another release, without the upper bounds."""
    shutil.rmtree(target, ignore_errors=True)
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, target, ignore=ignored)
    if not declared:
        pyproject = target / "pyproject.toml"
        pyproject.write_text(without_upper_bounds(pyproject.read_text()))
    return target


def without_upper_bounds(text: str) -> str:
    """A ``pyproject.toml`` that takes any newer release of what it bounds."""
    for name in BOUNDED:
        text, count = re.subn(rf'"({name}>=[\d.]+),<[\d.]+"', r'"\1"', text)
        assert count == 1, f"pyproject.toml has one range of {name}"
    return text


def pins(environment: Environment) -> list[str]:
    """Constraints: all that are pinned for the pinned versions; FMS alone for others."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    chosen = [f"torch=={environment.torch}", f"vllm=={environment.vllm}"]
    if all(line in lines for line in chosen):
        return lines
    return [*chosen, *(line for line in lines if line.startswith("ibm-fms=="))]


def heading(groups: list[str]) -> tuple[str, str]:
    """The first lines of the table."""
    columns = ["Python", *SHOWN, *groups, "date"]
    return f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"


def row(folder: Path, results: list[str]) -> str:
    """A line of the table: what is installed, and what the tests said."""
    asked = "import importlib.metadata as m, platform; print(platform.python_version(), "
    asked += ", ".join(f"m.version({name!r})" for name in SHOWN) + ")"
    installed = run([*python_of(folder), "-c", asked]).split()
    cells = [*installed, *results, datetime.date.today().isoformat()]
    return f"| {' | '.join(cells)} |"


def python_of(folder: Path) -> list[str]:
    return [str(folder.absolute() / "bin" / "python")]


def run(command: list[str], folder: Path = ROOT, **environment: str) -> str:
    """Run a command to its end; its standard output.

    Raises:
        MatrixError: it failed, with the last lines that say why, or took longer than it may.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=inherited | environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise MatrixError(f"not ended after {LIMIT} s") from None
    if done.returncode:
        lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
        telling = [line for line in lines if line.startswith(("ERROR", "FAILED", "E  "))]
        raise MatrixError(
            "\n    ".join([*telling[-12:], *(done.stdout.splitlines() or lines)[-1:]])
        )
    return done.stdout


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MatrixError as error:
        sys.exit(str(error))

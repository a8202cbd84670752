# SPDX-License-Identifier: Apache-2.0
"""Makes the files of a release in ``dist/``, and runs the demo from them as a stranger would.

``make release`` builds the source distribution and from that the wheel, has twine check their
metadata, looks at what is in them, installs the wheel with the pinned dependencies into a fresh
environment, and runs the demo there, outside the checkout. Nothing is uploaded and nothing tagged:
the last line says whether the version may be.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"

BUILD_TOOLS = ("build", "twine")

NEEDED = (
    "LICENSE",
    "py.typed",
    "demo/tiny_granite_vision/config.json",
    "demo/tiny_granite_vision/model.safetensors",
    "demo/tiny_granite_vision/tokenizer.json",
    "entry_points.txt",
)
"""Ends of the names of files that a wheel has to hold beside the package's modules."""

DEMO = "right answer:"
"""The demo prints each answer above the right one; see ``vllm_spyre_mm/demo/__main__.py``."""


class ReleaseError(RuntimeError):
    """What was built is not fit for a release."""


def main() -> int:
    """Build, check, install and run; the exit status is 1 if one of these fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--no-install", action="store_true", help="stop after the checks of the files"
    )
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="release-") as folder:
            wheel = build(Path(folder))
            print(f"built and checked: {', '.join(sorted(file.name for file in DIST.iterdir()))}")
            if not arguments.no_install:
                print(demonstrate(wheel, Path(folder)))
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(verdict(version(), (ROOT / "CHANGELOG.md").read_text()))
    return 0


def version() -> str:
    """The version of the checkout, from the one place that says it."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def build(folder: Path) -> Path:
    """Build the two files into ``dist/``, and check them; the wheel.

    Args:
        folder: for the environment of the tools, which is made in it.

    Raises:
        ReleaseError: they cannot be built, or something is wrong with them.
    """
    python = environment(folder / "tools")
    run([*pip_install(python), *BUILD_TOOLS])
    shutil.rmtree(DIST, ignore_errors=True)
    run([python, "-m", "build", "--outdir", str(DIST)])
    files = sorted(DIST.iterdir())
    run([python, "-m", "twine", "check", "--strict", *map(str, files)])
    expected = [f"vllm_spyre_mm-{version()}{end}" for end in ("-py3-none-any.whl", ".tar.gz")]
    if [file.name for file in files] != expected:
        raise ReleaseError(f"expected {expected}, built {[file.name for file in files]}")
    wheel, source = files
    with zipfile.ZipFile(wheel) as packed, tarfile.open(source) as sources:
        check_contents(packed.namelist(), sources.getnames())
    return wheel


def check_contents(wheel: list[str], source: list[str]) -> None:
    """Check the names of the files in a wheel and in the source distribution that it is built from.

    Raises:
        ReleaseError: something is missing, or does not belong there.
    """
    modules = {f"vllm_spyre_mm/{file}" for file in package_files()}
    missing = sorted(modules - set(wheel))
    missing += [end for end in NEEDED if not any(name.endswith(end) for name in wheel)]
    inside = {name.partition("/")[2] for name in source}
    missing += sorted(each for each in (*modules, "README.md", "LICENSE") if each not in inside)
    if missing:
        raise ReleaseError(f"not packed: {', '.join(missing)}")
    strangers = [
        name for name in wheel if name.partition("/")[0] not in ("vllm_spyre_mm", dist_info())
    ]
    if strangers:
        raise ReleaseError(f"packed, and not the package's: {', '.join(strangers)}")


def dist_info() -> str:
    return f"vllm_spyre_mm-{version()}.dist-info"


def package_files() -> list[str]:
    """Files of the package that git knows, below its folder."""
    listed = run(["git", "ls-files", "vllm_spyre_mm"])
    return [name.removeprefix("vllm_spyre_mm/") for name in listed.splitlines()]


def demonstrate(wheel: Path, folder: Path) -> str:
    """Install a wheel with the pinned dependencies into a fresh environment and run the demo there.

    Returns:
        What the demo printed.

    Raises:
        ReleaseError: it does not install, or the demo fails or runs from somewhere else.
    """
    pins = ROOT / "constraints.txt"
    vllm = re.search(r"^vllm==(.*)$", pins.read_text(), re.M)
    assert vllm is not None, "vLLM is pinned"
    python = environment(folder / "fresh")
    run(
        [*pip_install(python), "--no-binary", "vllm", "--constraint", str(pins), str(wheel)],
        VLLM_TARGET_DEVICE="empty",
        VLLM_VERSION_OVERRIDE=vllm[1],
    )
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    found = run([python, "-c", "import vllm_spyre_mm as m; print(m.__file__)"], elsewhere).strip()
    if not Path(found).is_relative_to(folder):
        raise ReleaseError(f"the demo would run from {found}, not from the wheel")
    printed = run([python, "-m", "vllm_spyre_mm.demo"], elsewhere, VLLM_LOGGING_LEVEL="ERROR")
    if DEMO not in printed or not (elsewhere / "mm_embedding_demo.png").is_file():
        raise ReleaseError(f"the demo did not answer: {printed[-2000:]}")
    return printed


def verdict(of: str, changelog: str) -> str:
    """Whether a version may be tagged and published."""
    heading = re.search(r"^## (.*)$", changelog, re.M)
    assert heading is not None, "the changelog has versions"
    dated = re.fullmatch(re.escape(of) + r" - \d{4}-\d\d-\d\d", heading[1])
    if dated and re.fullmatch(r"[\d.]+", of):
        return f"{of} can be tagged"
    return (
        f"{of} is not for publication: set the version in pyproject.toml to that of the release, "
        f'and "{heading[1]}" in CHANGELOG.md to the version and the date'
    )


def environment(folder: Path) -> str:
    """Make a virtual environment of this Python; its interpreter."""
    run([sys.executable, "-m", "venv", str(folder)])
    return str(folder / "bin" / "python")


def pip_install(python: str) -> list[str]:
    return [python, "-m", "pip", "install", "--quiet"]


def run(command: list[str], folder: Path = ROOT, **variables: str) -> str:
    """Run a command to its end; its standard output.

    Raises:
        ReleaseError: it failed; with the last lines of what it printed.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=inherited | variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
        telling = [line for line in lines if not line.startswith("WARNING")]
        shown = "\n    ".join(telling[-20:])
        raise ReleaseError(f"{' '.join(command[1:4])} failed:\n    {shown}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())

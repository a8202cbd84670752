# SPDX-License-Identifier: Apache-2.0
"""What a release has packed, and what may be tagged; ``make release`` has the rest."""

import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import release

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """Names in a wheel and in the source distribution that it is built from."""
    folder, source = (tmp_path_factory.mktemp(name) for name in ("dist", "source"))
    for name in release.run(["git", "ls-files"]).splitlines():
        if not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    release.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    )
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as packed, tarfile.open(archive) as sources:
        return packed.namelist(), sources.getnames()


def test_everything_of_the_package_is_packed(built: tuple[list[str], list[str]]) -> None:
    release.check_contents(*built)


@pytest.mark.parametrize(
    "name",
    [
        "vllm_spyre_mm/platform.py",
        "vllm_spyre_mm/demo/tiny_granite_vision/model.safetensors",
        "vllm_spyre_mm/model_executor/cpu/kernels/registry.py",
    ],
)
def test_what_is_not_packed_is_found(built: tuple[list[str], list[str]], name: str) -> None:
    wheel, source = built
    with pytest.raises(release.ReleaseError, match=f"not packed: {name}"):
        release.check_contents([each for each in wheel if each != name], source)
    with pytest.raises(release.ReleaseError, match=f"not packed: {name}"):
        release.check_contents(wheel, [each for each in source if not each.endswith(name)])


def test_strangers_are_found(built: tuple[list[str], list[str]]) -> None:
    wheel, source = built
    with pytest.raises(release.ReleaseError, match=r"not the package's: tests/conftest\.py$"):
        release.check_contents([*wheel, "tests/conftest.py"], source)


@pytest.mark.parametrize(
    ("version", "heading", "may_be_tagged"),
    [
        ("0.7.0", "0.7.0 - 2027-01-31", True),
        ("0.7.0", "0.7.0 - unreleased", False),
        ("0.7.0.dev0", "0.7.0 - unreleased", False),
        ("0.7.0.dev0", "0.7.0.dev0 - 2027-01-31", False),
        ("0.7.1", "0.7.0 - 2027-01-31", False),
    ],
)
def test_what_may_be_tagged(version: str, heading: str, may_be_tagged: bool) -> None:
    said = release.verdict(version, f"# Changelog\n\n## {heading}\n\n## 0.1.0 - 2026-11-21\n")
    assert said.startswith(f"{version} can be tagged") == may_be_tagged


def test_a_command_that_fails_says_so() -> None:
    with pytest.raises(release.ReleaseError, match="-m nothing_of_that_name failed:"):
        release.run([sys.executable, "-m", "nothing_of_that_name"])

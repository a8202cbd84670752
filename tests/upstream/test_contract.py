# SPDX-License-Identifier: Apache-2.0
"""What vLLM lacks is said by name, at start."""

import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType

import pytest

from vllm_spyre_mm import frontend, vllm_fixes
from vllm_spyre_mm.upstream.contract import (
    UnsupportedVllmError,
    check_versions,
    require,
    require_attributes,
    require_overridable,
    require_parameters,
    untested_versions,
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Pretend that another version of a distribution is installed."""
    real = importlib.metadata.version

    def pretend(name: str, version: str) -> None:
        monkeypatch.setattr(
            importlib.metadata, "version", lambda asked: version if asked == name else real(asked)
        )

    return pretend


def untested(name: str) -> list[str]:
    """What is said of one distribution."""
    return [sentence for sentence in untested_versions() if sentence.startswith(f"{name} ")]


def test_what_is_installed_here_is_supported():
    check_versions()


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("vllm", "0.31.9"),
        ("vllm", "0.32.0rc1"),
        ("torch", "2.10.1+cpu"),
        ("ibm-fms", "1.12.0"),
        ("transformers", "4.57.0"),
    ],
)
def test_a_version_that_is_older_is_refused(
    installed: Callable[[str, str], None], name: str, version: str
):
    installed(name, version)
    with pytest.raises(UnsupportedVllmError, match=f"works with {name}") as error:
        check_versions()
    assert f"{version} is installed" in str(error.value)
    assert "<" in str(error.value), "the range is said too"


@pytest.mark.parametrize(
    ("name", "version"),
    [("vllm", "0.34.0"), ("vllm", "1.0.0rc1+cpu"), ("torch", "2.15.0"), ("ibm-fms", "1.14.0")],
)
def test_a_version_that_is_newer_is_left_to_the_contract(
    installed: Callable[[str, str], None], name: str, version: str
):
    assert not untested(name)
    installed(name, version)
    check_versions()
    (sentence,) = untested(name)
    assert sentence.startswith(f"{name} {version} is newer than any that was tested ({name}<")


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("vllm", "0.32.0+empty"),
        ("vllm", "0.33.4"),
        ("vllm", "0.32.1rc2"),
        ("torch", "2.11.0+cpu"),
        ("torch", "2.14.1+cu130"),
    ],
)
def test_builds_and_patches_of_a_supported_version_are_accepted(
    installed: Callable[[str, str], None], name: str, version: str
):
    installed(name, version)
    check_versions()
    assert not untested(name)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["not-installed-anywhere>=3"])
    with pytest.raises(
        UnsupportedVllmError, match=r"it needs not-installed-anywhere>=3, which is not installed"
    ):
        check_versions()
    assert not list(untested_versions())


def test_optional_requirements_are_not_checked(monkeypatch: pytest.MonkeyPatch):
    """Nobody who serves has the test tools; and a requirement may be without a range."""
    lines = ["not-installed-anywhere>=3; extra == 'test'", "also-not-installed"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: lines)
    check_versions()


def sample(one: int, *, two: int = 0) -> None:
    """A function with two parameters."""


def test_a_missing_parameter_is_named():
    require_parameters(sample, ("one", "two"))
    with pytest.raises(UnsupportedVllmError, match="sample has no parameter 'three'") as error:
        require_parameters(sample, ("one", "three"))
    assert importlib.metadata.version("vllm") in str(error.value)
    assert "vllm<0.34,>=0.32" in str(error.value)


def test_a_missing_attribute_is_named():
    require_attributes(UnsupportedVllmError, ("__init__",))
    with pytest.raises(UnsupportedVllmError, match="UnsupportedVllmError has no 'absent'"):
        require_attributes(UnsupportedVllmError, ("__init__", "absent"))
    with pytest.raises(UnsupportedVllmError, match=r"importlib\.metadata has no 'absent'"):
        require_attributes(importlib.metadata, ("absent",))


class Base:
    """What is overridden."""

    def one(self, first: int) -> int:
        return first

    def two(self, first: int, second: int = 0) -> tuple[int, list[int]]:
        return first, [second]

    def four(self, first: int, later: int) -> int:
        return first + later


class Derived(Base):
    """Overrides it, as vLLM of another version would not expect."""

    def one(self, first: int) -> int:
        return first

    def two(self, first: int) -> tuple[int, list[int]]:  # type: ignore[override]
        return first, []

    def three(self) -> None:
        """The base has none."""

    def four(self, first: int, *more: int) -> int:  # type: ignore[override]
        return first + sum(more)


def test_an_override_that_would_be_called_otherwise_is_named():
    require_overridable(Base, Derived.one)
    require_overridable(Base, Base.two, returned=2)
    with pytest.raises(
        UnsupportedVllmError,
        match=r"Base\.two takes \(self, first, second\), and not \(self, first\)",
    ):
        require_overridable(Base, Derived.two, returned=2)
    with pytest.raises(UnsupportedVllmError, match=r"Base\.two returns 2 values, not 3"):
        require_overridable(Base, Base.two, returned=3)
    with pytest.raises(UnsupportedVllmError, match="Base has no 'three'"):
        require_overridable(Base, Derived.three)


def test_an_override_may_know_the_parameters_of_several_releases():
    require_overridable(Base, Derived.four, known=("self, first", "self, first, later"))
    with pytest.raises(
        UnsupportedVllmError,
        match=r"Base\.four takes \(self, first, later\), and not \(self, a\) or \(self, b\)",
    ):
        require_overridable(Base, Derived.four, known=("self, a", "self, b"))


def test_a_condition_that_holds_says_nothing():
    require(True, "never said")
    with pytest.raises(UnsupportedVllmError, match=": the sentence"):
        require(False, "the sentence")


def changes_of_modules() -> list[Callable[[ModuleType], None]]:
    """What the hooks do to modules of vLLM's once they are loaded."""
    return [
        function
        for room in (frontend, vllm_fixes)
        for hook in pkgutil.walk_packages(room.__path__, f"{room.__name__}.")
        for function in vars(importlib.import_module(hook.name)).values()
        if inspect.isfunction(function)
        and function.__module__ == hook.name
        and inspect.get_annotations(function) == {"module": ModuleType, "return": None}
    ]


def test_every_hook_refuses_a_module_that_lacks_what_it_changes():
    changes = changes_of_modules()
    assert len(changes) > 15
    for change in changes:
        empty = ModuleType("empty")
        before = dict(vars(empty))
        with pytest.raises(UnsupportedVllmError):
            change(empty)
        assert vars(empty) == before, change.__qualname__

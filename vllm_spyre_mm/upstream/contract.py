# SPDX-License-Identifier: Apache-2.0
"""Checks that vLLM's classes are what the hooks were written against."""

import importlib.metadata
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from packaging.requirements import Requirement
from packaging.specifiers import Specifier
from packaging.version import Version

DISTRIBUTION = "vllm-spyre-mm"

BELOW = ("<", "<=")
"""Operators of an upper bound."""


class UnsupportedVllmError(RuntimeError):
    """vLLM (or FMS) is not one that this version of the plugin works with."""


def requirements() -> Iterator[Requirement]:
    """What this package declares that it needs, with a range."""
    for line in importlib.metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        if requirement.marker is None and requirement.specifier:
            yield requirement


def faulty_versions() -> Iterator[str]:
    """A sentence for each distribution that is missing, or older than what is declared."""
    for requirement in requirements():
        installed = _installed(requirement)
        if installed is None:
            yield f"it needs {requirement.name}{requirement.specifier}, which is not installed"
        elif any(bound.operator not in BELOW for bound in _exceeded(requirement, installed)):
            yield (
                f"it works with {requirement.name}{requirement.specifier}, but {installed} is "
                "installed"
            )


def untested_versions() -> Iterator[str]:
    """A sentence for each distribution that is newer than any release that was tested."""
    for requirement in requirements():
        installed = _installed(requirement)
        if installed is None:
            continue
        exceeded = _exceeded(requirement, installed)
        if exceeded and all(bound.operator in BELOW for bound in exceeded):
            yield (
                f"{requirement.name} {installed} is newer than any that was tested "
                f"({requirement.name}{requirement.specifier})"
            )


def _installed(requirement: Requirement) -> Version | None:
    try:
        return Version(importlib.metadata.version(requirement.name))
    except importlib.metadata.PackageNotFoundError:
        return None


def _exceeded(requirement: Requirement, installed: Version) -> list[Specifier]:
    """The bounds of a range that a version is beyond."""
    # A build's suffix (+empty, +cpu) does not change the interface.
    return [
        bound
        for bound in requirement.specifier
        if not bound.contains(installed.public, prereleases=True)
    ]


def check_versions() -> None:
    """Compare what is installed with the ranges that this package declares.

    A release that is newer than them is left to the checks of what is leant on: where those hold,
    a start warns of it (:func:`untested_versions`).

    Raises:
        UnsupportedVllmError: something is missing, or older.
    """
    for fault in faulty_versions():
        raise UnsupportedVllmError(
            f"{DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)} cannot run with what is "
            f"installed: {fault} (`vllm-spyre-mm doctor` checks everything)"
        )


def require(condition: bool, what: str) -> None:
    """Raise :class:`UnsupportedVllmError` saying ``what`` is missing unless ``condition`` holds."""
    if condition:
        return
    declared = next((str(each) for each in requirements() if each.name == "vllm"), "vllm")
    raise UnsupportedVllmError(
        f"vLLM {importlib.metadata.version('vllm')} is not as {DISTRIBUTION} "
        f"{importlib.metadata.version(DISTRIBUTION)} expects it ({declared}): {what}"
    )


def require_parameters(function: Callable[..., Any], names: Iterable[str]) -> None:
    """Check that ``function`` has the parameters ``names``.

    Raises:
        UnsupportedVllmError: one is missing.
    """
    parameters = inspect.signature(function).parameters
    for name in names:
        require(name in parameters, f"{function.__qualname__} has no parameter {name!r}")


def require_methods(owner: type, expected: Mapping[str, Iterable[str]]) -> None:
    """Check that ``owner`` has the methods ``expected``, with these parameters at least.

    Raises:
        UnsupportedVllmError: a method is missing, or one of its parameters.
    """
    require_attributes(owner, expected)
    for name, parameters in expected.items():
        require_parameters(getattr(owner, name), parameters)


def require_assigned(function: Callable[..., Any], names: Iterable[str]) -> None:
    """Check that ``function`` (an ``__init__``) names the attributes ``names`` in its code.

    For attributes that are looked for with a default, because they may not be there yet.

    Raises:
        UnsupportedVllmError: one is missing.
    """
    found = inspect.unwrap(function).__code__.co_names
    for name in names:
        require(name in found, f"{function.__qualname__} sets no attribute {name!r}")


def require_overridable(
    base: type, override: Callable[..., Any], returned: int = 1, known: Sequence[str] = ()
) -> None:
    """Check that ``base`` has the method that ``override`` overrides, as it expects it.

    Args:
        base: the class that calls it.
        override: the function that takes its place.
        returned: values that it returns.
        known: the parameters of each release, of an override that takes those of all of them.

    Raises:
        UnsupportedVllmError: the method is missing, its parameters have other names or another
            order, or its annotation says another number of values.
    """
    name = override.__name__
    require_attributes(base, (name,))
    signature = inspect.signature(getattr(base, name))
    expected = known or (", ".join(inspect.signature(override).parameters),)
    found = ", ".join(signature.parameters)
    either = " or ".join(f"({parameters})" for parameters in expected)
    require(found in expected, f"{base.__name__}.{name} takes ({found}), and not {either}")
    annotation = signature.return_annotation
    values = len(get_args(annotation)) if get_origin(annotation) is tuple else 1
    require(values == returned, f"{base.__name__}.{name} returns {values} values, not {returned}")


def require_attributes(owner: object, names: Iterable[str]) -> None:
    """Check that ``owner`` (a class or module) has the attributes ``names``.

    Raises:
        UnsupportedVllmError: one is missing.
    """
    for name in names:
        require(hasattr(owner, name), f"{getattr(owner, '__name__', owner)} has no {name!r}")

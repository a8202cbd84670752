# SPDX-License-Identifier: Apache-2.0
"""Checks that vLLM's classes are what the hooks were written against."""

import importlib.metadata
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args, get_origin

from packaging.requirements import Requirement
from packaging.version import Version

DISTRIBUTION = "vllm-spyre-mm"


class UnsupportedVllmError(RuntimeError):
    """vLLM (or FMS) is not one that this version of the plugin works with."""


def requirements() -> Iterator[Requirement]:
    """What this package declares that it needs, with a range."""
    for line in importlib.metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        if requirement.marker is None and requirement.specifier:
            yield requirement


def faulty_versions() -> Iterator[str]:
    """A sentence for each distribution that is missing or outside the range that is declared."""
    for requirement in requirements():
        try:
            installed = Version(importlib.metadata.version(requirement.name))
        except importlib.metadata.PackageNotFoundError:
            yield f"it needs {requirement.name}{requirement.specifier}, which is not installed"
            continue
        # A build's suffix (+empty, +cpu) does not change the interface.
        if not requirement.specifier.contains(installed.public, prereleases=True):
            yield (
                f"it works with {requirement.name}{requirement.specifier}, but {installed} is "
                "installed"
            )


def check_versions() -> None:
    """Compare the installed vLLM, FMS and PyTorch with the ranges this package declares.

    Raises:
        UnsupportedVllmError: one is outside its range.
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


def require_assigned(function: Callable[..., Any], names: Iterable[str]) -> None:
    """Check that ``function`` (an ``__init__``) names the attributes ``names`` in its code.

    For attributes that are looked for with a default, because they may not be there yet.

    Raises:
        UnsupportedVllmError: one is missing.
    """
    found = inspect.unwrap(function).__code__.co_names
    for name in names:
        require(name in found, f"{function.__qualname__} sets no attribute {name!r}")


def require_overridable(base: type, override: Callable[..., Any], returned: int = 1) -> None:
    """Check that ``base`` has the method that ``override`` overrides, as it expects it.

    Args:
        base: the class that calls it.
        override: the function that takes its place.
        returned: values that it returns.

    Raises:
        UnsupportedVllmError: the method is missing, its parameters have other names or another
            order, or its annotation says another number of values.
    """
    name = override.__name__
    require_attributes(base, (name,))
    signature = inspect.signature(getattr(base, name))
    expected = ", ".join(inspect.signature(override).parameters)
    found = ", ".join(signature.parameters)
    require(found == expected, f"{base.__name__}.{name} takes ({found}), and not ({expected})")
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

# SPDX-License-Identifier: Apache-2.0
"""Checks that vLLM's classes are what the hooks were written against."""

import importlib.metadata
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

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
        # A build suffix (0.32.0+empty, 2.13.0+cpu) does not change the interface.
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


def require_attributes(owner: object, names: Iterable[str]) -> None:
    """Check that ``owner`` (a class or module) has the attributes ``names``.

    Raises:
        UnsupportedVllmError: one is missing.
    """
    for name in names:
        require(hasattr(owner, name), f"{getattr(owner, '__name__', owner)} has no {name!r}")

# SPDX-License-Identifier: Apache-2.0
"""Renames the tensors of a checkpoint by patterns."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Patterns = Sequence[tuple[str, str]]
"""Regular expressions of parts of a stored name, and what takes their place, one after another."""


def renamed(name: str, patterns: Patterns) -> str:
    """A stored name with each pattern's matches replaced."""
    for stored, ours in patterns:
        name = re.sub(stored, ours, name)
    return name


def renaming_step(patterns: Patterns) -> Callable[..., dict[str, Any]]:
    """A step of an FMS adapter that renames all tensors."""

    def rename_all(input_sd: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        return {renamed(name, patterns): tensor for name, tensor in input_sd.items()}

    return rename_all

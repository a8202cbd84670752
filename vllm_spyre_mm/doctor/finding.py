# SPDX-License-Identifier: Apache-2.0
"""The result of a check."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]
"""``warning``: it works, but worse than it could; ``error``: a start or a request would fail."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found.

    Attributes:
        check: the check's name.
        level: how bad it is.
        says: what was found, in a sentence or less.
        do: what to do about it; empty where there is nothing to do.
    """

    check: str
    level: Level
    says: str
    do: str = ""

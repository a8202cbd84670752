# SPDX-License-Identifier: Apache-2.0
"""Work that is done in pieces, with other work in between.

A vision encoder takes far longer than a decode. It is a generator that yields after each layer, so
that whoever runs it can decode between two of them.
"""

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")

Pieces = Generator[None, None, Result]
"""Work that yields after each piece of it, and returns its result."""


def whole(pieces: Pieces[Result]) -> Result:
    """Do all of the work at once; returns its result."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: Result = end.value
            return result

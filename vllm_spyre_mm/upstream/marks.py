# SPDX-License-Identifier: Apache-2.0
"""How a hook knows that it is installed: by a mark of its own on what it put in vLLM's place.

That something wraps a function (``__wrapped__``) says nothing: tracers and other plugins wrap
vLLM's functions too, and a hook that took theirs for its own would be missing without an error.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

MARK = "__vllm_spyre_mm_hooks__"
"""Attribute of functions and classes: the hooks that made them, or what they extend."""


def extending(original: Callable[..., Any], hook: str) -> Callable[[Function], Function]:
    """Like :func:`functools.wraps`, and marks what takes the place of ``original``.

    Args:
        original: what was found.
        hook: name of the hook's module, ``__name__``.
    """

    def decorate(extension: Function) -> Function:
        functools.update_wrapper(extension, original)
        return mark(extension, hook)

    return decorate


def mark(extension: Function, hook: str) -> Function:
    """Mark a function or a class of a hook; marks that it has from what it extends are kept."""
    setattr(extension, MARK, getattr(extension, MARK, frozenset()) | {hook})
    return extension


def is_extended(found: Any, hook: str) -> bool:
    """Whether the hook made ``found``, or what it wraps or inherits from."""
    innermost = inspect.unwrap(found, stop=lambda each: hook in getattr(each, MARK, ()))
    return hook in getattr(innermost, MARK, ())

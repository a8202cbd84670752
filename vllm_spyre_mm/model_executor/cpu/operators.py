# SPDX-License-Identifier: Apache-2.0
"""Operators of PyTorch's that this package defines, ``torch.ops.spyre_mm``: opaque to compilers."""

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def define_operator(schema: str, **kernels: Callable[..., Any]) -> torch.library.Library:
    """Define an operator, once however often it is asked for.

    Args:
        schema: its name and signature, as :meth:`torch.library.Library.define` takes them.
        kernels: what computes it, by PyTorch's dispatch key: ``CPU``, ``MkldnnCPU``, and ``Meta``
            for the shapes of the results alone. The same functions each time.

    Returns:
        The library that the operator lives as long as; the cache keeps it.
    """
    library = torch.library.Library("spyre_mm", "FRAGMENT")
    library.define(schema)
    for key, kernel in kernels.items():
        library.impl(schema.partition("(")[0], kernel, key)
    return library


def shape_of_first(first: torch.Tensor, *_: Any) -> torch.Tensor:
    """For ``Meta``: a result with the shape and dtype of the first argument."""
    return first.new_empty(first.shape)

# SPDX-License-Identifier: Apache-2.0
"""Another release of PyTorch than the installed one: without what was added, or with parts gone."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vllm_spyre_mm.model_executor.cpu import torch_internals


@contextmanager
def pytorch_without_internals() -> Iterator[None]:
    """A release that has lost two of the parts that compilation leans on."""
    gone = {"torch._dynamo.convert_frame": ("moved",), "torch.no_module": ("anything",)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_internals, "COMPILER", torch_internals.COMPILER | gone)
        torch_internals.why_not_compiled.cache_clear()
        yield
    torch_internals.why_not_compiled.cache_clear()


@contextmanager
def oldest_pytorch() -> Iterator[None]:
    """The oldest release: nothing says to Inductor for which CPU, or without which flags."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("takes_architecture", "_may_leave_vectors_out"):
            patch.setattr(torch_internals, name, lambda: False)
        yield

# SPDX-License-Identifier: Apache-2.0
"""A plugin of pytest: every C++ kernel is compiled with AddressSanitizer. ``make asan`` uses it.

An access outside of a tensor, or to one that was freed, ends the run with a report. The sanitizer's
runtime has to be loaded before Python, which the target of the Makefile does.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from torch._inductor.codecache import CppCodeCache

FLAGS = ("-fsanitize=address", "-fno-omit-frame-pointer", "-g1")


@pytest.fixture(scope="session", autouse=True)
def sanitized() -> Iterator[None]:
    """Gives the compiler the flags; they are part of the compile cache's keys."""
    original = CppCodeCache.load.__func__

    def load(
        cls: type, source: str, *rest: Any, extra_flags: Sequence[str] = (), **more: Any
    ) -> Any:
        return original(cls, source, *rest, extra_flags=(*extra_flags, *FLAGS), **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CppCodeCache, "load", classmethod(load))
        yield

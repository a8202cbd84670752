# SPDX-License-Identifier: Apache-2.0
"""The process's memory."""

import ctypes


def return_free_memory() -> None:
    """Give the operating system what is free; glibc would keep it.

    For the moments after a great deal was needed once: replaced weights, a compilation.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

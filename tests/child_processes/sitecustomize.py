# SPDX-License-Identifier: Apache-2.0
"""What Python does first in each process that a test starts.

Importing PyTorch and vLLM makes a million objects that live on, and the garbage collector looks at
them again and again meanwhile: a quarter of the CPU time of the imports, in some two hundred
processes. It waits here until somebody collects, as vLLM does once an engine or a server has
started, and works as usual from then on.
"""

import gc

USUAL = gc.get_threshold()


def as_usual(phase: str, info: dict[str, int]) -> None:
    """Called by the first collection."""
    gc.set_threshold(*USUAL)
    gc.callbacks.remove(as_usual)


gc.callbacks.append(as_usual)
gc.set_threshold(2_000_000)

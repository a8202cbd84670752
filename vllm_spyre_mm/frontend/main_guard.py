# SPDX-License-Identifier: Apache-2.0
"""Explains a script without ``if __name__ == "__main__"`` before it spawns itself.

vLLM starts its engine in a process of its own, and here that process is spawned: it imports the
script that started it. Without the guard it would start an engine in turn; Python then stops with
a long explanation of its bootstrapping phase, in the middle of two tracebacks.
"""

import ast
import multiprocessing
import sys
from types import FrameType

SENTENCE = (
    "vLLM starts its engine in a new process, which imports this script again: put the code that "
    'creates the engine below `if __name__ == "__main__":` (or set '
    "VLLM_ENABLE_V1_MULTIPROCESSING=0 to run the engine in this process)."
)


def check_main_guard() -> None:
    """Exit with one sentence if the running script would start engines without end.

    Raises:
        SystemExit: with :data:`SENTENCE`.
    """
    # Set by multiprocessing in a child while it imports its parent's script.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(SENTENCE)
    if multiprocessing.parent_process() is None and _runs_unguarded():
        raise SystemExit(SENTENCE)


def _runs_unguarded() -> bool:
    """Whether the main script's top-level code is on the stack and nothing in it looks at
    ``__name__``; scripts that guard themselves in another way are left to the check above."""
    frame = _top_level_frame()
    if frame is None:
        return False
    try:
        with open(frame.f_code.co_filename, encoding="utf-8") as file:
            names = {
                node.id for node in ast.walk(ast.parse(file.read())) if isinstance(node, ast.Name)
            }
    except (OSError, SyntaxError, ValueError):
        return False  # no file that a child could import either: `python -c`, a notebook
    return "__name__" not in names


def _top_level_frame() -> FrameType | None:
    """The frame of the main script's module, if it is being executed."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            return frame
        frame = frame.f_back
    return None

# SPDX-License-Identifier: Apache-2.0
"""Tells a test what happens in processes that are not its own."""

import os
from pathlib import Path

FOLDER = "STAND_IN_REPORTS"
"""Names the variable with the folder for reports, a file a process."""


def report(line: str) -> None:
    """Append a line to this process's report, if reports are wanted."""
    folder = os.environ.get(FOLDER)
    if folder:
        with (Path(folder) / f"{os.getpid()}.txt").open("a") as file:
            file.write(f"{line}\n")

# SPDX-License-Identifier: Apache-2.0
"""How a process has to end: with status 0, and without a crash of any process that it started."""

PERTURBED = {"MALLOC_PERTURB_": "165", "PYTHONFAULTHANDLER": "1"}
"""Environment in which memory holds garbage before it is written to and after it is freed, and in
which a process that crashes says so, whoever started it."""

CRASH = "Fatal Python error"


def check_end(status: int, printed: str) -> None:
    """Fail if a process did not end as it should.

    Args:
        status: how it ended.
        printed: everything that it and those it started printed to standard error.
    """
    assert CRASH not in printed, printed[printed.index(CRASH) :][:4000]
    assert status == 0, f"it ended with status {status}:\n{printed[-4000:]}"

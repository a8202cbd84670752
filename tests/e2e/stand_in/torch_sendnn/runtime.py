# SPDX-License-Identifier: Apache-2.0
"""The device's runtime: what it does to the process that it is loaded into."""

import ctypes
import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT)
CARDS = tuple(f"AIU_WORLD_RANK_{number}" for number in range(4))
"""Variables with the addresses of cards, of as many as a test has."""
CALL_SECONDS = float(os.environ.get("STAND_IN_CALL_SECONDS", "0.002"))
COMPUTES = os.environ.get("STAND_IN_COMPUTES", "1") == "1"
"""Whether a deployed program's results are right, for which the host computes. A benchmark of the
host beside a card takes results that are made up: a card's calls leave the host's cores idle."""

_libc = ctypes.CDLL(None)
_libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.signal.restype = ctypes.c_void_p
_abort = ctypes.cast(_libc.abort, ctypes.c_void_p).value


def take_signals() -> None:
    """Make SIGTERM and SIGINT end the process, as the runtime's logging (g3log) does.

    In C, so that Python knows nothing of it. (S ``v1/worker/spyre_worker.py:832``, issue#191,
    PR#187.)
    """
    for each in SIGNALS:
        _libc.signal(each, _abort)


def taken_signals() -> list[signal.Signals]:
    """Those that still end the process, now and not at import."""
    taken = []
    for each in SIGNALS:
        installed = _libc.signal(each, signal.SIG_IGN)
        _libc.signal(each, installed)
        if installed == _abort:
            taken.append(each)
    return taken


def call_device(*, deploys: bool) -> None:
    """The time of a call: nothing else runs in the process, whose CPUs are idle.

    (S keeps its asynchronous encoder in a process because a call holds up other threads.)

    Args:
        deploys: whether a program is deployed, for which the runtime takes the signals again.
    """
    if deploys:
        take_signals()
    ctypes.PyDLL(None).usleep(int(CALL_SECONDS * 1e6))  # which keeps Python's lock

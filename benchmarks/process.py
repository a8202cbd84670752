# SPDX-License-Identifier: Apache-2.0
"""Runs ``drivers/driver.py`` in processes of their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DRIVER = Path(__file__).parent / "drivers" / "driver.py"


class DriverError(RuntimeError):
    """A process that was to be measured ended; the message has what it wrote last."""


class Driver:
    """A model in another process.

    Args:
        model: folder of the checkpoint.
        kind: one of ``driver.KINDS``.
        python: the interpreter; its environment decides what is measured.
        environment: variables besides this process's own.
        imports: modules to import before the clock starts, besides those of the kind.
        engine: arguments of ``LLM``, or options of another kind.

    Raises:
        DriverError: it did not start.
    """

    def __init__(
        self,
        model: Path,
        *,
        kind: str = "vllm",
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
        imports: Sequence[str] = (),
        **engine: Any,
    ) -> None:
        arguments = json.dumps(
            {"model": str(model), "kind": kind, "imports": [*imports], "engine": engine}
        )
        variables = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **(environment or {})}
        if python != sys.executable:
            variables.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, str(DRIVER), arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=variables,
            start_new_session=True,
        )
        try:
            self.start = self._reply()
        except DriverError:
            self.__exit__()
            raise

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **command}) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        last: list[str] = []
        for line in self._process.stdout:
            _, mark, reply = line.partition("@@")
            if mark:
                return json.loads(reply)
            last = [*last[-20:], line]
        raise DriverError(f"{DRIVER.name} ended:\n{''.join(last)}")

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # what it may have left behind

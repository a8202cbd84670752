# SPDX-License-Identifier: Apache-2.0
"""Runs what a page of the documentation tells its reader to do, in its order.

A comment before a block says what it is: ``runnable`` goes to a shell, ``file NAME`` is saved under
that name, ``server`` starts one, ``printed`` is what the commands before it print.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.serving import Served

DOCS = Path(__file__).parents[2] / "docs"

BLOCK = re.compile(
    r"^<!-- (runnable|server|printed|file [\w.]+) -->\n```\w*\n(.*?)^```$", re.M | re.S
)

ADDRESS, PORT = "http://localhost:8000", "8000"
"""Of the server on the pages."""

TOOLS = ("vllm", "vllm-spyre-mm", "python")
"""What the pages call by name: the environment of the test has it beside its Python."""


@dataclass(frozen=True)
class Page:
    """A page, or a part of it below a heading.

    Attributes:
        text: in Markdown.
    """

    text: str

    @classmethod
    def of(cls, name: str, heading: str | None = None) -> "Page":
        """A page of ``docs/``, or what stands below one of its ``##`` headings."""
        text = (DOCS / name).read_text()
        if heading is None:
            return cls(text)
        (below,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
        return cls(below)

    @property
    def every_block(self) -> list[tuple[str, str]]:
        """What kind each marked block is of, and its text, in order."""
        return BLOCK.findall(self.text)

    def blocks(self, kind: str) -> list[str]:
        """Texts of the blocks of a kind."""
        return [text for found, text in self.every_block if found == kind]

    def script(self, address: str = ADDRESS) -> str:
        """A shell script of all that is run or saved.

        Args:
            address: of the server, in place of the page's.
        """
        lines = ["set -e\n"]
        for kind, text in self.every_block:
            if kind == "runnable":
                lines.append(text)
            elif kind.startswith("file "):
                lines.append(
                    f"cat > {kind.removeprefix('file ')} <<'END_OF_FILE'\n{text}END_OF_FILE\n"
                )
        return "".join(lines).replace(ADDRESS, address)


def environment() -> dict[str, str]:
    """The environment of a terminal in which the package's is active."""
    folder = Path(sys.executable).parent
    assert all((folder / tool).exists() for tool in TOOLS)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def run_script(script: str, folder: Path) -> str:
    """What a shell script prints; it has to succeed."""
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@contextlib.contextmanager
def page_server(page: Page, checkpoint: Path, folder: Path, *more: str) -> Iterator[Served]:
    """The page's server with a checkpoint, on a port that is free, on the loopback interface alone.

    Args:
        page: with one block ``server``.
        checkpoint: stands for ``$MODEL``.
        folder: of the file for what it prints.
        more: flags besides those of the page.
    """
    (command,) = page.blocks("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = {"$MODEL": str(checkpoint), PORT: str(port)}
    tool, *words = (here.get(word, word) for word in shlex.split(command.replace("\\\n", "")))
    assert str(checkpoint) in words
    assert str(port) in words
    log = folder / "log.txt"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [str(Path(sys.executable).parent / tool), *words, "--host", "127.0.0.1", *more],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
        ) as process,
    ):
        try:
            served = Served(f"http://127.0.0.1:{port}", process, log)
            served.wait_until_healthy()
            yield served
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)

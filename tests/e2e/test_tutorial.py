# SPDX-License-Identifier: Apache-2.0
"""The commands of the tutorial, in its order, in a shell; the server is the one that it starts."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import Served
from vllm_spyre_mm.demo import checkpoint_path

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()

BLOCK = re.compile(r"^<!-- (runnable|server|printed) -->\n```\w*\n(.*?)^```$", re.M | re.S)
BLOCKS = BLOCK.findall(PAGE)
ADDRESS = "http://localhost:8000"

TOOLS = ("vllm", "vllm-spyre-mm", "python")
"""What the page calls by name: the environment of the test has it beside its Python."""


def blocks(kind: str) -> list[str]:
    return [text for found, text in BLOCKS if found == kind]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """The environment of a terminal in which the package's is active."""
    folder = Path(sys.executable).parent
    assert all((folder / tool).exists() for tool in TOOLS)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def server(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The page's server on a port that is free, on the loopback interface alone."""
    (command,) = blocks("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(checkpoint_path()) if word == "$MODEL" else word for word in shlex.split(command)]
    words[words.index("8000")] = str(port)
    log = tmp_path_factory.mktemp("tutorial") / "log.txt"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [str(Path(sys.executable).parent / words[0]), *words[1:], "--host", "127.0.0.1"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        ) as process,
    ):
        try:
            served = Served(f"http://127.0.0.1:{port}", process, log)
            served.wait_until_healthy()
            yield served
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def test_every_block_of_the_page_is_executed_or_compared() -> None:
    assert PAGE.count("```") == 2 * len(BLOCKS)
    assert [kind for kind, _ in BLOCKS].count("runnable") == 4


def test_the_commands_do_what_the_page_says(
    environment: dict[str, str], server: Served, tmp_path: Path
) -> None:
    script = "set -e\n" + "".join(blocks("runnable")).replace(ADDRESS, server.address)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (printed,) = blocks("printed")
    assert done.stdout.endswith(printed)
    assert ": 0 errors, " in done.stdout
    assert "GraniteVision" in done.stdout
    assert (tmp_path / "features.png").stat().st_size > 1000
    assert (tmp_path / "features-00001.safetensors").exists()

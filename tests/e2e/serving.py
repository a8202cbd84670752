# SPDX-License-Identifier: Apache-2.0
"""A real server in a process of its own, and how it is asked."""

import base64
import contextlib
import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.exits import check_end
from vllm_spyre_mm.vllm_fixes.shutdown_errors import INTERRUPTED

VLLM = str(Path(sys.executable).parent / "vllm")
START_SECONDS = 480


EXACT = ("--dtype", "float32", "--enforce-eager")
"""Answers equal Transformers' to the last digit that is shown, and nothing is compiled."""


def serve_command(checkpoint: Path, port: int, *more: str, defaults: bool = False) -> list[str]:
    """Of a small server: exact, unless it is to have the dtype and the compiler of the defaults."""
    return [
        VLLM,
        "serve",
        str(checkpoint),
        "--device",
        "spyre",
        "--enable-return-mm-embedding",
        "--limit-mm-per-prompt",
        '{"image": 4}',
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        "demo",
        "--max-model-len",
        "1024",
        "--kv-cache-memory-bytes",
        "128M",
        *(() if defaults else EXACT),
        *more,
    ]


@dataclass(frozen=True)
class Served:
    """A server in a process of its own.

    Attributes:
        address: without a path.
        process: ends when the context is left; a test may end it before.
        log: file with what it prints.
    """

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def starting_server(
    checkpoint: Path,
    log: Path,
    *more: str,
    plugins: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
    defaults: bool = False,
) -> Iterator[Served]:
    """A server that has been started, and is ended when the context is left, with status 0.

    Args:
        checkpoint: folder of the model.
        log: file for what it prints.
        more: flags besides those of :func:`serve_command`.
        plugins: folders with plugins of vLLM's for its processes.
        environment: more of it.
        defaults: as for :func:`serve_command`.
    """
    port = free_port()
    path = [*map(str, plugins), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (
        log.open("w") as output,
        subprocess.Popen(
            serve_command(checkpoint, port, *more, defaults=defaults),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path),
                "PYTHONFAULTHANDLER": "1",
                **(environment or {}),
            },
        ) as process,
    ):
        try:
            yield Served(f"http://127.0.0.1:{port}", process, log)
        finally:
            ended_by_the_test = process.poll() is not None
            process.terminate()
            process.wait(60)
    if not ended_by_the_test and INTERRUPTED not in (printed := log.read_text()):
        check_end(process.returncode, printed)


@contextlib.contextmanager
def running_server(
    checkpoint: Path,
    log: Path,
    *more: str,
    environment: Mapping[str, str] | None = None,
    defaults: bool = False,
) -> Iterator[str]:
    """The address of a server that runs inside the context; see :func:`starting_server`."""
    with starting_server(
        checkpoint, log, *more, environment=environment, defaults=defaults
    ) as server:
        server.wait_until_healthy()
        yield server.address


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def chat(client: openai.OpenAI, question: str, *urls: str, **more: Any) -> str:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    parts.append({"type": "text", "text": question})
    response = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": parts}],
        temperature=0,
        max_tokens=24,
        **more,
    )
    return response.choices[0].message.content


def metrics(server: str) -> dict[str, float]:
    """The platform's metrics of a server with one engine, by name; no key is asked for them."""
    (found,) = metrics_by_engine(server).values()
    return found


def metrics_by_engine(server: str) -> dict[str, dict[str, float]]:
    """The platform's metrics of a server, by the number of the engine and by name."""
    with urllib.request.urlopen(f"{server}/metrics", timeout=60) as response:
        families = text_string_to_metric_families(response.read().decode())
    found: dict[str, dict[str, float]] = {}
    for sample in (sample for family in families for sample in family.samples):
        if sample.name.startswith("vllm:spyre_") and not sample.name.endswith("_created"):
            name = sample.name.removeprefix("vllm:spyre_")
            found.setdefault(sample.labels["engine"], {})[name] = sample.value
    return found

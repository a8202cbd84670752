# SPDX-License-Identifier: Apache-2.0
"""The server that these tests share."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.server_embeddings.requests import MAX_QUEUED
from tests.e2e.serving import running_server


@pytest.fixture(scope="session")
def server(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    settings = json.dumps({"max_mm_embedding_response_bytes": 700_000})
    flags = (
        *("--additional-config", settings),
        *("--max-num-queued-reqs", str(MAX_QUEUED)),
        "--enable-mm-embeds",
        "--enable-scale-out",
    )
    developing = {"VLLM_SERVER_DEV_MODE": "1"}
    with running_server(demo_checkpoint, log, *flags, environment=developing) as address:
        yield address


@pytest.fixture(scope="session")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0) as client:
        yield client

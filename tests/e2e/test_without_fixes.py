# SPDX-License-Identifier: Apache-2.0
"""A server whose fixes of vLLM's faults are switched off starts and serves."""

from pathlib import Path

import openai
import pytest
from PIL import Image

from tests.e2e.serving import chat, data_url, png, starting_server


def test_a_server_without_fixes(demo_checkpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    off = {"SPYRE_MM_VLLM_FIXES": "0"}
    with starting_server(demo_checkpoint, log, environment=off) as server:
        server.wait_until_healthy()
        base_url = f"{server.address}/v1"
        client = openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0)
        good = png(Image.new("RGB", (60, 60), "red"))
        assert chat(client, "What is in the picture?", data_url(good), data_url(good))
        # vLLM's own answer to a damaged picture; with the fixes it is 400.
        broken = bytearray(good)
        start = broken.index(b"IDAT") - 4
        broken[start : start + 4] = (int.from_bytes(broken[start : start + 4]) // 2).to_bytes(4)
        with pytest.raises(openai.APIError) as error:
            chat(client, "What is in the picture?", data_url(bytes(broken)))
        assert not isinstance(error.value, openai.BadRequestError)
        # vLLM has closed the connection.
        client = openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0)
        assert chat(client, "What is in the picture?", data_url(good))

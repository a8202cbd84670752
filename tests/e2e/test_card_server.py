# SPDX-License-Identifier: Apache-2.0
"""The card's path in processes of its own: a server of one rank and of two, ended by a signal."""

from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import STAND_IN
from tests.e2e.serving import chat, data_url, png, starting_server
from vllm_spyre_mm.demo.pictures import Shape, draw_picture

PICTURE = data_url(png(draw_picture([Shape("circle", "red", "top left")], (192, 144)).image))
GRAPHS = {f"graph {number} {where}" for number in (0, 1) for where in ("in warmup", "deployed")}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_keeps_the_contract_and_ends_at_a_signal(
    demo_checkpoint: Path, tmp_path: Path, ranks: int
) -> None:
    """Its status is looked at where the context is left: 0, although the card's runtime has made
    SIGTERM end the process."""
    reports = tmp_path / "reports"
    reports.mkdir()
    with starting_server(
        demo_checkpoint,
        tmp_path / "log.txt",
        *("--tensor-parallel-size", str(ranks), "--max-num-batched-tokens", "128"),
        plugins=[STAND_IN],
        environment={"STAND_IN_REPORTS": str(reports)},
        defaults=True,
    ) as server:
        server.wait_until_healthy()
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
        answer = chat(client, "What is in the picture?", PICTURE)
        assert answer == "a red circle at the top left"
        assert chat(client, "Say hello.")
    lines = [report.read_text().splitlines() for report in reports.iterdir()]
    assert len(lines) == ranks, "the compiler is imported by the workers alone"
    for printed in lines:
        assert set(printed) == GRAPHS | {"imported"}

# SPDX-License-Identifier: Apache-2.0
"""The card's path in processes of its own: a server of one rank, and one of two engines with two
ranks each, ended by a signal."""

import json
import signal
from pathlib import Path

import pytest

from tests.e2e.asked import asked
from tests.e2e.conftest import STAND_IN
from tests.e2e.serving import chat, data_url, png, starting_server
from tests.e2e.test_faults import FAULTY, SHUT_DOWN, failed
from vllm_spyre_mm.demo.pictures import Shape, draw_picture

PICTURE = data_url(png(draw_picture([Shape("circle", "red", "top left")], (192, 144)).image))
GRAPHS = {f"graph {number} {where}" for number in (0, 1) for where in ("in warmup", "deployed")}

CARDS, PORT = [f"0000:{number}:00.0" for number in ("1a", "1b", "1c", "1d")], 12355
"""What an image for four cards names to every process."""


def named(cards: list[str], port: int) -> dict[str, str]:
    """Variables with the cards and the port of an engine."""
    numbered = {f"AIU_WORLD_RANK_{number}": address for number, address in enumerate(cards)}
    return {**numbered, "MASTER_PORT": str(port)}


@pytest.mark.parametrize(
    ("ranks", "engines", "encode_ahead"),
    [
        (1, [named(CARDS, PORT)], True),
        (2, [named(CARDS[:2], PORT), named(CARDS[2:], PORT + 1)], False),
    ],
    ids=["a rank and an encoder", "two engines of two ranks"],
)
def test_a_server_keeps_the_contract_and_ends_at_a_signal(
    demo_checkpoint: Path,
    tmp_path: Path,
    ranks: int,
    engines: list[dict[str, str]],
    encode_ahead: bool,
) -> None:
    """With status 0, although the card's runtime has made SIGTERM end the process, and while the
    encoder's process is in the middle of a picture. Each engine answers, and its ranks know of its
    cards alone."""
    reports = tmp_path / "reports"
    reports.mkdir()
    with (
        starting_server(
            demo_checkpoint,
            tmp_path / "log.txt",
            *("--tensor-parallel-size", str(ranks), "--data-parallel-size", str(len(engines))),
            *("--max-num-batched-tokens", "128", "--api-server-count", "1"),
            *("--additional-config", json.dumps({"encode_ahead": encode_ahead})),
            "--enable-log-requests",
            plugins=[STAND_IN, FAULTY],
            environment={"STAND_IN_REPORTS": str(reports), **named(CARDS, PORT)},
            defaults=True,
        ) as started,
        asked(started) as server,
    ):
        for engine in range(len(engines)):
            to = {"X-data-parallel-rank": str(engine)}
            answer = chat(server.client, "What is in the picture?", PICTURE, extra_headers=to)
            assert answer == "a red circle at the top left"
            assert chat(server.client, "Say hello.", extra_headers=to)
        encoders = [each for each in server.processes if each.name() == "VLLM::Encoder"]
        assert len(encoders) == encode_ahead
        under_way = server.stall() if encode_ahead else []
        started.process.send_signal(signal.SIGTERM)
        for request in under_way:
            assert SHUT_DOWN in failed(request)
        server.ends(0, "shutting down FastAPI HTTP server")
    variables = []
    for report in reports.iterdir():
        printed = report.read_text().splitlines()
        assert {line for line in printed if "=" not in line} == GRAPHS | {"imported"}
        variables.append(dict(line.split("=") for line in printed if "=" in line))
    by_port = sorted(variables, key=lambda each: each["MASTER_PORT"])
    assert by_port == [engine for engine in engines for _ in range(ranks)], (
        "the compiler is imported by the workers alone"
    )

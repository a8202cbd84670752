# SPDX-License-Identifier: Apache-2.0
"""The proxy of the examples before two encoders, one of which is killed, and a decoder."""

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.engines import relative_error
from tests.e2e.server_embeddings.requests import expected_features, parts_of, post
from tests.e2e.serving import (
    START_SECONDS,
    Served,
    chat,
    data_url,
    free_port,
    metrics,
    png,
    starting_server,
)
from tests.e2e.test_server import answer, picture
from tests.reference import Reference
from vllm_spyre_mm.demo.pictures import Picture
from vllm_spyre_mm.payload import decode_mm_embedding

PROXY = Path(__file__).parents[2] / "examples" / "online_serving" / "encoder_proxy" / "proxy.py"
QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class Fleet:
    """Two encoders, a decoder, and the address of a proxy before them."""

    encoders: tuple[Served, Served]
    decoder: Served
    proxy: str

    def health(self) -> dict[str, dict[str, bool]]:
        """What the proxy says of the servers."""
        with urllib.request.urlopen(f"{self.proxy}/health", timeout=30) as response:
            return json.load(response)

    def encoded_by(self, server: Served) -> int:
        """Pictures for which a server's encoder ran."""
        return int(metrics(server.address)["encoder_runs_total"])


@pytest.fixture(scope="module")
def fleet(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")

    def flags(role: str) -> tuple[str, str]:
        config = {
            "ec_connector": "FolderConnector",
            "ec_connector_module_path": "vllm_spyre_mm.scheduler.folder_connector",
            "ec_role": role,
            "ec_connector_extra_config": {"folder": str(folder / "features")},
        }
        return "--ec-transfer-config", json.dumps(config)

    roles = {"encoder-0": "ec_producer", "encoder-1": "ec_producer", "decoder": "ec_consumer"}
    with contextlib.ExitStack() as stack:
        *encoders, decoder = (
            stack.enter_context(
                starting_server(demo_checkpoint, folder / f"{name}.txt", *flags(role))
            )
            for name, role in roles.items()
        )
        for server in (*encoders, decoder):
            server.wait_until_healthy()
        port = free_port()
        names = [argument for each in encoders for argument in ("--encoder", each.address)]
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, PROXY, *names, "--decoder", decoder.address, "--port", str(port)]
            )
        )
        stack.callback(process.terminate)
        found = Fleet((encoders[0], encoders[1]), decoder, f"http://127.0.0.1:{port}")
        wait_for_proxy(found)
        yield found


def wait_for_proxy(fleet: Fleet) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            fleet.health()
            return
        time.sleep(0.2)
    pytest.fail("the proxy did not start")


@pytest.fixture
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.proxy}/v1", api_key="unused", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, *pictures: Picture) -> str:
    return chat(client, QUESTION, *[data_url(png(each.image)) for each in pictures])


def test_encoders_encode_and_the_decoder_answers(
    fleet: Fleet, client: openai.OpenAI, demo_reference: Reference
) -> None:
    drawn = [picture(seed) for seed in range(8)]
    for each in drawn:
        assert ask(client, each) == answer(demo_reference, QUESTION, each.image)
    runs = [fleet.encoded_by(encoder) for encoder in fleet.encoders]
    assert sum(runs) == len(drawn)
    assert all(runs)
    for each in drawn:  # to the encoder that has it
        assert ask(client, each) == answer(demo_reference, QUESTION, each.image)
    assert [fleet.encoded_by(encoder) for encoder in fleet.encoders] == runs
    assert fleet.encoded_by(fleet.decoder) == 0


def test_a_producer_serves_embeddings_and_saves_what_it_encodes(
    fleet: Fleet, client: openai.OpenAI, demo_reference: Reference
) -> None:
    """The decoder answers about the picture with what the folder has since."""
    drawn = picture(30)
    before = sum(map(fleet.encoded_by, fleet.encoders))
    status, body = post(fleet.encoders[0].address, {"input": parts_of(drawn.image)})
    assert status == 200
    found = decode_mm_embedding(body["mm_embedding"])
    assert relative_error(found, expected_features(demo_reference, drawn.image)) < 1e-4
    assert ask(client, drawn) == answer(demo_reference, QUESTION, drawn.image)
    assert fleet.encoded_by(fleet.decoder) == 0
    assert sum(map(fleet.encoded_by, fleet.encoders)) == before + 1


def test_an_answer_streams_and_brings_the_embedding(
    fleet: Fleet, client: openai.OpenAI, demo_reference: Reference
) -> None:
    drawn = picture(20)
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": data_url(png(drawn.image))}},
        {"type": "text", "text": QUESTION},
    ]
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": parts}],
        temperature=0,
        max_tokens=24,
        stream=True,
        extra_body={"return_mm_embedding": True},
    )
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    text = "".join(each.delta.content or "" for each in chunks)
    assert len(chunks) > 2
    assert text == answer(demo_reference, QUESTION, drawn.image)
    assert chunks[-1].mm_embedding


def test_what_is_wrong_is_refused_in_the_decoders_words(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Failed to load image"):
        chat(client, QUESTION, data_url(b"this is text"))


def test_an_encoder_that_is_killed_under_load_loses_no_request(
    fleet: Fleet, client: openai.OpenAI, demo_reference: Reference
) -> None:
    """Every answer comes and is right; what the encoder had not encoded, the other one has."""
    killed, other = fleet.encoders
    drawn = {seed: picture(seed) for seed in range(100, 148)}
    with ThreadPoolExecutor(6) as threads:
        asked = {threads.submit(ask, client, each): seed for seed, each in drawn.items()}
        for number, done in enumerate(as_completed(asked)):
            expected = answer(demo_reference, QUESTION, drawn[asked[done]].image)
            assert done.result() == expected
            if number == 6:
                killed.process.kill()
    state = fleet.health()
    assert state["encoders"] == {killed.address: False, other.address: True}
    before = fleet.encoded_by(other)
    for seed in range(200, 208):
        assert ask(client, picture(seed)) == answer(demo_reference, QUESTION, picture(seed).image)
    assert fleet.encoded_by(other) == before + 8

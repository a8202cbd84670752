# SPDX-License-Identifier: Apache-2.0
"""A server with the defaults, the dtype's and the compiler's, in memory that holds garbage: hostile
requests, faults of pictures, a soak, and its end. The same in fp32, where answers are exact, is in
the files of those names."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.e2e.exits import PERTURBED, check_end
from tests.e2e.serving import Served, chat, starting_server
from tests.e2e.test_faults import FAULTY, NAN, QUESTION, SENTENCES, faulty, good
from tests.hostile.all import all_cases
from tests.hostile.drive import Judge, send
from tests.reference import Reference
from tools.soak.report import faults, report
from tools.soak.soak import INSPECTOR, Soak, SoakOptions

BF16_BOUND = 2e-2
LEAD = 0.5
"""Logits by which a token leads that bf16 does not change; see test_default_configuration.py."""


@pytest.fixture(scope="module")
def server(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With chunks of two blocks and eight rows, so that requests wait for each other."""
    with starting_server(
        demo_checkpoint,
        tmp_path_factory.mktemp("defaults") / "log.txt",
        *("--enable-mm-embeds", "--max-num-batched-tokens", "128", "--max-num-seqs", "8"),
        *("--shutdown-timeout", "30"),
        plugins=[INSPECTOR, FAULTY],
        environment={"VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1", **PERTURBED},
        defaults=True,
    ) as server:
        server.wait_until_healthy()
        yield server


def test_hostile_requests_are_refused_or_answered_rightly(
    server: Served, demo_reference: Reference
) -> None:
    judge = Judge(demo_reference, bound=BF16_BOUND, lead=LEAD)
    cases = list(all_cases("defaults"))[1::8]
    assert len(cases) >= 500
    found = {answer.case.name: judge.fault(answer) for answer in send(server.address, cases)}
    assert {name: fault for name, fault in found.items() if fault is not None} == {}


@pytest.mark.parametrize("fault", SENTENCES, ids=["raises", "NaN", "out of memory"])
def test_one_request_fails_and_the_others_do_not_notice(server: Served, fault: int) -> None:
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0)
    alone = [chat(client, QUESTION, good(seed)) for seed in range(4)]
    with ThreadPoolExecutor(5) as threads:
        failing = threads.submit(chat, client, QUESTION, faulty(fault))
        others = [threads.submit(chat, client, QUESTION, good(seed)) for seed in range(4)]
        with pytest.raises(openai.APIError) as raised:
            failing.result()
        assert [each.result() for each in others] == alone
    sentence = SENTENCES[fault]
    if fault == NAN:
        sentence = sentence.removesuffix(" in float32")
    assert sentence in str(raised.value)


def test_a_soak_leaves_nothing(server: Served) -> None:
    options = SoakOptions(requests=250, outstanding=32, pool=16, seed=2)
    result = asyncio.run(Soak(server.address, server.process.pid, options).run())
    assert not faults(result), report(result)
    assert set(result.endings) == {"right", "left"}


def test_told_to_end_it_lets_its_engine_leave_in_order(server: Served) -> None:
    server.process.terminate()
    check_end(server.process.wait(120), server.log.read_text())

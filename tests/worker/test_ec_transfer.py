# SPDX-License-Identifier: Apache-2.0
"""What one rank does with a connector's features; two ranks are in tests/worker/test_ranks.py."""

from typing import Any

import pytest
import torch
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from tests.worker.connector_stub import WIDTH, Metadata, Transfer
from tests.worker.test_encoding import image
from vllm_spyre_mm.scheduler.step import CarriedMetadata
from vllm_spyre_mm.worker.ranks import Ranks

GOOD = torch.full((3, WIDTH), 7.0)


def runs(made: Transfer) -> int:
    """Pictures that are counted as encoded beside what was asked for."""
    return getattr(made.transfer.attach(EMPTY_MODEL_RUNNER_OUTPUT), "num_encoded_anew", 0)


@pytest.mark.parametrize("role", ["ec_both", "ec_producer"])
def test_what_is_not_saved_fails_and_is_in_no_cache(role: str) -> None:
    made = Transfer(Ranks(), role)
    made.connector.fault = "save"
    fault = made.step(Metadata(), image(3), asked=(0,))
    assert fault is not None
    assert fault.endswith("did not take them: OSError: [Errno 28] No space left on device")
    assert not made.cache
    made.connector.fault = None
    assert made.step(Metadata(), image(3), asked=(0,)) is None
    assert made.connector.saved == ["of 3"]


BAD: list[Any] = [
    torch.full((3, WIDTH), torch.nan),
    torch.ones(3, WIDTH, dtype=torch.int64),
    torch.ones(3, WIDTH).to(torch.float8_e4m3fn),
    torch.ones(3, WIDTH).numpy(),
    torch.ones(2, WIDTH),
]


@pytest.mark.parametrize("rows", BAD, ids=["nan", "int64", "float8", "array", "short"])
def test_what_is_refused_is_encoded_and_replaced(rows: Any) -> None:
    made = Transfer(Ranks())
    assert made.step(Metadata({"of 3": rows}), image(3)) is None
    assert made.encoded == [[0]]
    assert made.connector.saved == ["of 3"]
    assert made.cache == {"of 3": [[1.0] * WIDTH] * 3}
    assert runs(made) == 1


def test_what_is_good_is_neither_encoded_nor_saved() -> None:
    made = Transfer(Ranks())
    assert made.step(Metadata({"of 3": GOOD}), image(3)) is None
    assert made.encoded == [[]]
    assert not made.connector.saved
    assert made.cache == {"of 3": GOOD.tolist()}
    assert runs(made) == 0


def test_what_is_asked_for_is_encoded_whatever_is_brought() -> None:
    made = Transfer(Ranks())
    assert made.step(Metadata({"of 3": GOOD}), image(3), asked=(0,)) is None
    assert made.cache == {"of 3": [[1.0] * WIDTH] * 3}
    assert not made.transfer._unchecked


def test_what_a_client_gave_is_neither_saved_nor_counted() -> None:
    made = Transfer(Ranks())
    given = image(3, "image_embeds")
    assert made.step(Metadata(), given, asked=(0,)) is None
    assert made.step(Metadata(), image(5, "image_embeds"), image(2)) is None
    assert made.connector.saved == ["of 2"]
    assert runs(made) == 1


def test_a_request_that_is_refused_is_no_run() -> None:
    made = Transfer(Ranks(), "ec_consumer", has_encoder=False)
    fault = made.step(Metadata(), image(3))
    assert fault is not None
    assert "the EC connector has no features of image 1 of the request" in fault
    assert runs(made) == 0


def test_a_producer_that_cannot_give_what_it_has_fails_the_request() -> None:
    """vLLM has it give what was encoded in earlier steps before anything else."""
    made = Transfer(Ranks(), "ec_producer")
    made.connector.fault = "start"
    fault = made.step(Metadata(), image(3), asked=(0,))
    assert fault is not None
    assert fault.endswith("did not take them: ConnectionError: nobody is there")
    assert not made.cache


def test_one_that_answers_itself_goes_on() -> None:
    made = Transfer(Ranks(), "ec_both")
    made.connector.fault = "start"
    assert made.step(Metadata({"of 3": GOOD}), image(3)) is None
    assert made.encoded == [[0]]


def test_the_connector_sees_a_step_that_was_carried_over() -> None:
    """Its metadata, and each request that finished once; what it says of both goes back."""
    made = Transfer(Ranks())
    metadata = CarriedMetadata(Metadata({"of 3": GOOD}, "early"), Metadata(finishes="late"))
    assert made.step(metadata, image(3), finished=("other",)) is None
    assert made.encoded == [[]]
    output = made.transfer.attach(EMPTY_MODEL_RUNNER_OUTPUT)
    assert output.ec_connector_output is not None
    assert output.ec_connector_output.finished_sending == {"early", "late", "other"}
    assert made.transfer.attach(output) is output
    assert EMPTY_MODEL_RUNNER_OUTPUT.ec_connector_output is None
    assert isinstance(output, ModelRunnerOutput)


def test_the_warmup_has_no_connector() -> None:
    made = Transfer(Ranks())
    made.connector.fault = "save"
    assert made.step(None, image(3), asked=(0,)) is None

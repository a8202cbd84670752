# SPDX-License-Identifier: Apache-2.0
"""Features in a folder outlive the engine; whatever happens to them, answers stay right."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.config import ECTransferConfig
from vllm.distributed.ec_transfer import get_ec_transfer

from tests.e2e.engines import Ask, engine, greedy
from tests.multimodal.mm_mappings.suite import picture
from tests.reference import Reference

MAX_TOKENS = 12
ONE = Ask("What is it?", (picture(120, 60),))
TWO = Ask("And these?", (picture(120, 60), picture(40, 100)))
LATER = Ask("And now?", (picture(50, 90),))


def transfer(folder: Path, connector: str, module: str) -> ECTransferConfig:
    return ECTransferConfig(
        ec_connector=connector,
        ec_connector_module_path=module,
        ec_role="ec_both",
        ec_connector_extra_config={"folder": str(folder)},
    )


def generate(llm: LLM, ask: Ask) -> Any:
    (output,) = llm.generate(ask.prompt, greedy(MAX_TOKENS))
    return output.outputs[0]


def encoder_runs(llm: LLM) -> int:
    (found,) = (each for each in llm.get_metrics() if each.name == "vllm:spyre_encoder_runs")
    return found.value


@pytest.fixture(scope="module")
def folder(llava_next_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an engine has left in a folder; it has ended."""
    folder = tmp_path_factory.mktemp("folder")
    kept = transfer(folder, "FolderConnector", "vllm_spyre_mm.scheduler.folder_connector")
    with engine(
        llava_next_checkpoint, own_process=True, ec_transfer_config=kept, disable_log_stats=False
    ) as llm:
        generate(llm, TWO)
        assert encoder_runs(llm) == 2
    assert len(list(folder.iterdir())) == 2
    return folder


@pytest.fixture(scope="module")
def restarted(llava_next_checkpoint: Path, folder: Path) -> Iterator[LLM]:
    kept = transfer(folder, "FaultyConnector", "tests.e2e.faulty_connector")
    with engine(llava_next_checkpoint, ec_transfer_config=kept, disable_log_stats=False) as llm:
        yield llm


@pytest.fixture
def runs(restarted: LLM) -> Iterator[list[int]]:
    """Pictures encoded since the last look; the engine has nothing in memory at first."""
    restarted.llm_engine.reset_encoder_cache()
    before = [encoder_runs(restarted)]
    yield before
    get_ec_transfer().fault = None  # type: ignore[attr-defined]


def since(llm: LLM, runs: list[int]) -> int:
    runs.append(encoder_runs(llm))
    return runs[-1] - runs[-2]


def check(completion: Any, ask: Ask, reference: Reference) -> None:
    assert list(completion.token_ids) == reference.generate(ask.text, ask.images, MAX_TOKENS)
    assert completion.mm_embedding is not None


def test_a_restart_finds_what_was_encoded_before(
    restarted: LLM, runs: list[int], llava_next_reference: Reference
) -> None:
    for ask in (TWO, ONE):
        check(generate(restarted, ask), ask, llava_next_reference)
    assert since(restarted, runs) == 0


def test_a_damaged_file_is_encoded_anew_and_kept(
    restarted: LLM, runs: list[int], folder: Path, llava_next_reference: Reference
) -> None:
    files = sorted(folder.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-9])
    check(generate(restarted, TWO), TWO, llava_next_reference)
    assert since(restarted, runs) == 1
    restarted.llm_engine.reset_encoder_cache()
    check(generate(restarted, TWO), TWO, llava_next_reference)
    assert since(restarted, runs) == 0
    assert sorted(folder.iterdir()) == files


def test_what_cannot_be_loaded_is_encoded(
    restarted: LLM, runs: list[int], llava_next_reference: Reference
) -> None:
    get_ec_transfer().fault = "load"  # type: ignore[attr-defined]
    check(generate(restarted, TWO), TWO, llava_next_reference)
    assert since(restarted, runs) == 2


def test_a_request_whose_features_are_not_taken_fails_alone(
    restarted: LLM, runs: list[int], llava_next_reference: Reference
) -> None:
    get_ec_transfer().fault = "save"  # type: ignore[attr-defined]
    failed = generate(restarted, LATER)
    assert failed.finish_reason == "error"
    assert "did not take them: ConnectionError: the peer takes nothing" in failed.stop_reason
    get_ec_transfer().fault = None  # type: ignore[attr-defined]
    check(generate(restarted, LATER), LATER, llava_next_reference)
    assert since(restarted, runs) == 2  # the failed one too


def test_a_folder_that_cannot_be_written_costs_no_answer(
    restarted: LLM, runs: list[int], folder: Path, llava_next_reference: Reference
) -> None:
    moved = folder.rename(folder.with_name("moved"))
    try:
        check(generate(restarted, ONE), ONE, llava_next_reference)
        assert since(restarted, runs) == 1
    finally:
        moved.rename(folder)

# SPDX-License-Identifier: Apache-2.0
"""Features in a folder outlive the engine; whatever happens to them, answers stay right."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.config import ECTransferConfig

from tests.e2e.engines import Ask, engine, greedy
from tests.e2e.faulty_connector import SetsFault
from tests.multimodal.mm_mappings.suite import picture
from tests.reference import Reference

MAX_TOKENS = 12
ONE = Ask("What is it?", (picture(120, 60),))
TWO = Ask("And these?", (picture(120, 60), picture(40, 100)))
LATER = Ask("And now?", (picture(50, 90),))


FAULTY = ("FaultyConnector", "tests.e2e.faulty_connector")


def transfer(folder: Path, connector: str, module: str, role: Any = "ec_both") -> ECTransferConfig:
    return ECTransferConfig(
        ec_connector=connector,
        ec_connector_module_path=module,
        ec_role=role,
        ec_connector_extra_config={"folder": str(folder)},
    )


def generate(llm: LLM, ask: Ask) -> Any:
    return answer(llm, ask.prompt)


def answer(llm: LLM, prompt: Any) -> Any:
    (output,) = llm.generate(prompt, greedy(MAX_TOKENS))
    return output.outputs[0]


def preemptions(llm: LLM) -> int:
    (found,) = (each for each in llm.get_metrics() if each.name == "vllm:num_preemptions")
    return found.value  # type: ignore[attr-defined]


def set_fault(llm: LLM, fault: str | None) -> None:
    """Have the worker's connector fail in one part, or in none."""
    llm.collective_rpc("set_fault", args=(fault,))


class Counts:
    """Pictures encoded, and pictures found, since the last look.

    Args:
        llm: whose metrics are looked at.
    """

    NAMES = ("vllm:spyre_encoder_runs", "vllm:spyre_encoder_cache_hits")

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._before = self._now()

    def _now(self) -> list[int]:
        metrics = {each.name: each for each in self._llm.get_metrics()}
        return [metrics[name].value for name in self.NAMES]  # type: ignore[attr-defined]

    def __call__(self) -> tuple[int, int]:
        before, self._before = self._before, self._now()
        runs, hits = (now - then for now, then in zip(self._before, before, strict=True))
        return runs, hits


@pytest.fixture(scope="module")
def folder(llava_next_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an engine has left in a folder; it has ended."""
    folder = tmp_path_factory.mktemp("folder")
    kept = transfer(folder, "FolderConnector", "vllm_spyre_mm.scheduler.folder_connector")
    with engine(
        llava_next_checkpoint, own_process=True, ec_transfer_config=kept, disable_log_stats=False
    ) as llm:
        since = Counts(llm)
        generate(llm, TWO)
        assert since() == (2, 0)
    assert len(list(folder.iterdir())) == 2
    return folder


@contextlib.contextmanager
def faulty_engine(
    checkpoint: Path, folder: Path, role: str = "ec_both", **arguments: Any
) -> Iterator[LLM]:
    """An engine whose connector can be told to fail, and whose requests lose their blocks."""
    with engine(
        checkpoint,
        ec_transfer_config=transfer(folder, *FAULTY, role),
        worker_extension_cls=f"{SetsFault.__module__}.{SetsFault.__qualname__}",
        disable_log_stats=False,
        **arguments,
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def restarted(llava_next_checkpoint: Path, folder: Path) -> Iterator[LLM]:
    small = {"max_model_len": 1024, "max_num_batched_tokens": 128, "num_gpu_blocks_override": 24}
    with faulty_engine(llava_next_checkpoint, folder, **small) as llm:
        yield llm


@pytest.fixture
def since(restarted: LLM) -> Iterator[Counts]:
    """Counts of the engine, which has no features in memory at first."""
    restarted.llm_engine.reset_encoder_cache()
    restarted.reset_prefix_cache()
    yield Counts(restarted)
    set_fault(restarted, None)


def check(completion: Any, ask: Ask, reference: Reference) -> None:
    assert list(completion.token_ids) == reference.generate(ask.text, ask.images, MAX_TOKENS)
    assert completion.mm_embedding is not None


def test_a_restart_finds_what_was_encoded_before(
    restarted: LLM, since: Counts, llava_next_reference: Reference
) -> None:
    for ask in (TWO, ONE):
        check(generate(restarted, ask), ask, llava_next_reference)
    assert since() == (0, 3)


def test_a_damaged_file_is_encoded_anew_and_kept(
    restarted: LLM, since: Counts, folder: Path, llava_next_reference: Reference
) -> None:
    files = sorted(folder.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-9])
    check(generate(restarted, TWO), TWO, llava_next_reference)
    assert since() == (1, 1)
    restarted.llm_engine.reset_encoder_cache()
    check(generate(restarted, TWO), TWO, llava_next_reference)
    assert since() == (0, 2)
    assert sorted(folder.iterdir()) == files


def test_what_cannot_be_loaded_is_encoded(
    restarted: LLM, since: Counts, llava_next_reference: Reference
) -> None:
    set_fault(restarted, "load")
    check(generate(restarted, TWO), TWO, llava_next_reference)
    assert since() == (2, 0)


def test_a_request_whose_features_are_not_taken_fails_alone(
    restarted: LLM, since: Counts, llava_next_reference: Reference
) -> None:
    set_fault(restarted, "save")
    failed = generate(restarted, LATER)
    assert failed.finish_reason == "error"
    assert "did not take them: ConnectionError: the peer takes nothing" in failed.stop_reason
    set_fault(restarted, None)
    check(generate(restarted, LATER), LATER, llava_next_reference)
    assert since() == (2, 0)  # the failed one too


def test_a_folder_that_cannot_be_written_costs_no_answer(
    restarted: LLM, since: Counts, folder: Path, llava_next_reference: Reference
) -> None:
    moved = folder.rename(folder.with_name("moved"))
    try:
        check(generate(restarted, ONE), ONE, llava_next_reference)
        assert since() == (1, 0)
    finally:
        moved.rename(folder)


def test_requests_that_lose_their_blocks_read_the_folder(restarted: LLM, since: Counts) -> None:
    """Each starts again from its prompt, and its pictures are not encoded for that."""
    asks = [Ask("What is it?", (picture(40 + 20 * n, 90), picture(120, 60))) for n in range(4)]
    prompts, parameters = [each.prompt for each in asks], greedy(150, ignore_eos=True)
    alone = [restarted.generate(prompt, parameters)[0].outputs[0] for prompt in prompts]
    since()
    restarted.llm_engine.reset_encoder_cache()
    restarted.reset_prefix_cache()
    before = preemptions(restarted)
    together = [output.outputs[0] for output in restarted.generate(prompts, parameters)]
    assert preemptions(restarted) > before, "nothing was preempted: the scenario proves nothing"
    assert since()[0] == 0
    for found, expected in zip(together, alone, strict=True):
        assert found.token_ids == expected.token_ids
        assert torch.equal(found.mm_embedding, expected.mm_embedding)


# -- two ranks ------------------------------------------------------------------------------------


def test_two_ranks_read_and_write_one_folder(
    llava_next_checkpoint: Path, folder: Path, llava_next_reference: Reference
) -> None:
    """What one rank of another engine has left; a request whose features are not taken fails
    alone, on both ranks."""
    later = Ask("And then?", (picture(70, 50),))
    with faulty_engine(llava_next_checkpoint, folder, tensor_parallel_size=2) as llm:
        since = Counts(llm)
        check(generate(llm, TWO), TWO, llava_next_reference)
        assert since() == (0, 2)
        set_fault(llm, "save")
        assert generate(llm, later).finish_reason == "error"
        set_fault(llm, None)
        for _ in range(2):
            check(generate(llm, later), later, llava_next_reference)
            llm.llm_engine.reset_encoder_cache()
            llm.reset_prefix_cache()
        assert since() == (2, 1)

# SPDX-License-Identifier: Apache-2.0
"""The environment is set from the settings, what it says is noticed, and one module touches it."""

import ast
import importlib.metadata
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_spyre_mm
from vllm_spyre_mm import environment, register

PACKAGE = Path(vllm_spyre_mm.__path__[0])


@pytest.fixture
def messages() -> Iterator[list[logging.LogRecord]]:
    """What the module logs; vLLM's loggers do not propagate to pytest's handler."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    environment.logger.addHandler(handler)
    yield records
    environment.logger.removeHandler(handler)


def test_one_module_touches_the_environment():
    touching = {
        file.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "environb", "getenv", "putenv", "unsetenv")
    }
    assert touching == {"environment.py"}


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing of the card's is set before, and nothing that a test sets stays."""
    for name in (*LIMITS, *FIXED, *OF_RANKS, *THREADS, *LARGE, environment.TKV_LIMIT_SET_HERE):
        monkeypatch.setenv(name, "restored afterwards")
        monkeypatch.delenv(name)
    return monkeypatch


LIMITS = {
    "VLLM_DT_CHUNK_LEN": "512",
    "VLLM_DT_MAX_CONTEXT_LEN": "4096",
    "VLLM_DT_MAX_BATCH_SIZE": "16",
    "VLLM_DT_MAX_BATCH_TKV_LIMIT": "65536",
}
FIXED = {"COMPILATION_MODE": "offline_decoder", "FLEX_OVERWRITE_NMB_FRAME": "true"}
THREADS = dict.fromkeys(environment.THREAD_COUNTS, "6")
OF_RANKS = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "12355",
}
LARGE = {"FLEX_HDMA_P2PSIZE": "268435456", "FLEX_HDMA_COLLSIZE": "33554432"}


def exported() -> dict[str, str]:
    names = (*LIMITS, *FIXED, *OF_RANKS, *THREADS, *LARGE)
    return {name: os.environ[name] for name in names if name in os.environ}


def export_limits(max_num_seqs: int = 16) -> None:
    environment.export_card_environment(
        chunk_size=512, context_len=4096, max_num_seqs=max_num_seqs, max_batch_tkv=65536
    )


@pytest.mark.parametrize(("max_num_seqs", "batch"), [(1, "2"), (2, "2"), (16, "16")])
def test_the_cards_compiler_is_told_its_limits(
    unset: pytest.MonkeyPatch, max_num_seqs: int, batch: str
):
    """They follow from the settings, whatever was set."""
    for name in LIMITS:
        unset.setenv(name, "before")
    export_limits(max_num_seqs)
    assert exported() == LIMITS | FIXED | {"VLLM_DT_MAX_BATCH_SIZE": batch}


def test_what_the_user_has_set_for_the_card_stays(unset: pytest.MonkeyPatch):
    given = dict.fromkeys((*FIXED, *THREADS, *LARGE, "MASTER_ADDR"), "the user's")
    given["MASTER_PORT"] = "29500"
    for name, value in given.items():
        unset.setenv(name, value)
    export_limits()
    environment.export_rank_environment(rank=1, world_size=4, num_threads=6)
    assert exported() == LIMITS | given | {"RANK": "1", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [
        (1, THREADS),
        (2, THREADS | OF_RANKS),
        (4, THREADS | OF_RANKS | LARGE | {"WORLD_SIZE": "4"}),
    ],
)
@pytest.mark.usefixtures("unset")
def test_the_cards_runtime_is_told_of_its_rank(world_size: int, expected: dict[str, str]):
    environment.export_rank_environment(rank=1, world_size=world_size, num_threads=6)
    assert exported() == expected


@pytest.mark.parametrize(
    ("given", "port"), [(None, "12358"), ("12355", "12358"), ("29500", "29503")]
)
def test_ranks_of_other_engines_meet_elsewhere(
    unset: pytest.MonkeyPatch, given: str | None, port: str
):
    """Whatever is set, as in an image for cards: all engines of a host inherit it."""
    if given is not None:
        unset.setenv("MASTER_PORT", given)
    environment.export_rank_environment(rank=0, world_size=2, num_threads=6, engine=3)
    assert os.environ["MASTER_PORT"] == port


def test_a_port_that_is_none_is_refused(unset: pytest.MonkeyPatch):
    unset.setenv("MASTER_PORT", "tcp")
    with pytest.raises(ValueError, match=r"^MASTER_PORT='tcp' is no number of a port: set one"):
        environment.export_rank_environment(rank=0, world_size=2, num_threads=6)


def test_threads_that_vllm_has_set_are_not_the_users(unset: pytest.MonkeyPatch):
    """vLLM divides the host's cores by the ranks, and not by the engines too."""
    unset.setenv("OMP_NUM_THREADS", "12")
    unset.setenv("VLLM_OMP_NUM_THREADS_SET_BY_VLLM", "1")
    environment.export_rank_environment(rank=0, world_size=1, num_threads=6)
    assert exported() == THREADS


@pytest.mark.parametrize("listed", [None, "a,b,c,d"])
def test_an_engine_is_named_its_own_cards(monkeypatch: pytest.MonkeyPatch, listed: str | None):
    for number in range(4):
        monkeypatch.setenv(f"AIU_WORLD_RANK_{number}", f"card {number}")
    monkeypatch.setenv("AIU_WORLD_SIZE", "4")
    monkeypatch.delenv("SPYRE_DEVICES", raising=False)
    if listed:
        monkeypatch.setenv("SPYRE_DEVICES", listed)
    environment.export_cards_of_engine(1, 2)
    found = {name: value for name, value in os.environ.items() if name.startswith("AIU_WORLD_")}
    assert found == {
        "AIU_WORLD_RANK_0": "card 2",
        "AIU_WORLD_RANK_1": "card 3",
        "AIU_WORLD_SIZE": "2",
    }
    assert os.environ.get("SPYRE_DEVICES") == (listed and "c,d")
    assert environment.cards_named() == 2


def test_devices_that_are_not_the_cards_are_refused(monkeypatch: pytest.MonkeyPatch):
    for number in range(4):
        monkeypatch.setenv(f"AIU_WORLD_RANK_{number}", f"card {number}")
    monkeypatch.setenv("SPYRE_DEVICES", "0,1")
    with pytest.raises(ValueError, match=r"SPYRE_DEVICES lists 2 devices, and .* name 4 cards"):
        environment.export_cards_of_engine(1, 2)


@pytest.mark.parametrize(("name", "value"), [("RANK", "0"), ("WORLD_SIZE", "1")])
def test_a_rank_that_every_rank_inherits_is_refused(
    unset: pytest.MonkeyPatch, name: str, value: str
):
    unset.setenv(name, value)
    message = f"^{name}={value} is set in the environment of every rank, and this is rank 1 of 2"
    with pytest.raises(ValueError, match=message):
        environment.export_rank_environment(rank=1, world_size=2, num_threads=6)


def test_the_limit_is_the_users_unless_it_was_set_here(unset: pytest.MonkeyPatch):
    assert environment.card_batch_tkv_limit() is None
    export_limits()
    assert environment.card_batch_tkv_limit() is None
    unset.setenv("VLLM_DT_MAX_BATCH_TKV_LIMIT", "131072")
    assert environment.card_batch_tkv_limit() == 131072


@pytest.mark.parametrize("value", ["", "0", "-1", "many", "1.5"])
def test_a_limit_that_is_no_number_of_tokens_is_refused(unset: pytest.MonkeyPatch, value: str):
    unset.setenv("VLLM_DT_MAX_BATCH_TKV_LIMIT", value)
    with pytest.raises(ValueError, match=f"LIMIT='{value}' is no positive number of tokens"):
        environment.card_batch_tkv_limit()


@pytest.mark.parametrize(
    ("compute", "device", "fault"),
    [
        ("SENTIENT", "PF", None),
        ("SENTIENT", "VF", None),
        (None, None, "FLEX_COMPUTE is not set, FLEX_DEVICE not set: the runtime may take"),
        ("SENTIENT", None, "FLEX_COMPUTE is SENTIENT, FLEX_DEVICE not set: the runtime may take"),
        ("SENULATOR", "PF", "a simulator, and no card (FLEX_COMPUTE is SENULATOR, FLEX_DEVICE PF)"),
        (
            "SENTIENT",
            "MOCK",
            "a simulator, and no card (FLEX_COMPUTE is SENTIENT, FLEX_DEVICE",
        ),
        ("SENTIENT", "COMPILE", "programs are compiled and never run (FLEX_COMPUTE is SENTIENT, "),
        ("SENTIENT", "XF", "FLEX_COMPUTE is SENTIENT, FLEX_DEVICE XF, which no public image has"),
    ],
)
def test_a_runtime_without_a_card_is_noticed(
    compute: str | None, device: str | None, fault: str | None
):
    given = {"FLEX_COMPUTE": compute, "FLEX_DEVICE": device}
    variables = {name: value for name, value in given.items() if value is not None}
    found = environment.card_mode_fault(variables)
    assert (found is None) if fault is None else found.startswith(fault)
    stands_in = device in ("MOCK", "COMPILE") or compute == "SENULATOR"
    assert environment.runs_no_device(variables) == stands_in


@pytest.mark.parametrize(
    ("installed", "given", "expected"),
    [(True, None, "0"), (True, "1", "1"), (False, None, None)],
)
def test_an_extension_of_pytorch_is_not_loaded_unasked(
    tmp_path: Path, installed: bool, given: str | None, expected: str | None
):
    """The package decides when it is imported, without PyTorch, vLLM or the extension itself."""
    if installed:
        (tmp_path / "torch_nnpa").mkdir()
        (tmp_path / "torch_nnpa" / "__init__.py").write_text("raise AssertionError")
    name = "TORCH_DEVICE_BACKEND_AUTOLOAD"
    inherited = {each: value for each, value in os.environ.items() if each != name}
    inherited["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])
    if given is not None:
        inherited[name] = given
    script = (
        "import os, sys, vllm_spyre_mm\n"
        "assert not {'torch', 'vllm', 'torch_nnpa'} & sys.modules.keys()\n"
        f"print(os.environ.get({name!r}))"
    )
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, env=inherited, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(expected)


def test_processes_are_spawned_whatever_was_set(
    monkeypatch: pytest.MonkeyPatch, messages: list[logging.LogRecord]
):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    environment.prepare_process_environment()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert [record.levelname for record in messages] == ["WARNING"]
    assert "fork" in messages[0].getMessage()
    environment.prepare_process_environment()
    assert len(messages) == 1, "spawn is nothing to warn of"


@pytest.mark.parametrize(("value", "own"), [(None, True), ("1", True), ("0", False)])
def test_the_engine_has_its_own_process_unless_told(
    monkeypatch: pytest.MonkeyPatch, value: str | None, own: bool
):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", value)
    assert environment.engine_runs_in_own_process() == own


@pytest.mark.parametrize(
    ("value", "asked"),
    [(None, False), ("", False), ("0", False), ("1", True)],
)
def test_the_rust_front_end_is_noticed(
    monkeypatch: pytest.MonkeyPatch, value: str | None, asked: bool
):
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", value)
    assert environment.rust_frontend_requested() == asked


@pytest.mark.parametrize(
    ("plugins", "installed", "warned"),
    [
        (None, True, True),
        (None, False, False),
        ("spyre_mm", True, False),
        ("spyre_mm,sendnn_inference", True, True),
        ("", True, False),
    ],
)
def test_a_second_spyre_plugin_is_explained_unless_it_is_opted_out_of(
    monkeypatch: pytest.MonkeyPatch,
    messages: list[logging.LogRecord],
    plugins: str | None,
    installed: bool,
    warned: bool,
):
    def distribution(name: str) -> object:
        if name == "sendnn-inference" and installed:
            return object()
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    assert register() == "vllm_spyre_mm.platform.SpyrePlatform"
    assert len(messages) == int(warned)
    if warned:
        assert messages[0].levelname == "ERROR"
        assert "VLLM_PLUGINS=spyre_mm" in messages[0].getMessage()
        assert "uninstall" in messages[0].getMessage()

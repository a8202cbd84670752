# SPDX-License-Identifier: Apache-2.0
"""The environment is set from the settings, what it says is noticed, and one module touches it."""

import ast
import importlib.metadata
import logging
import os
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


@pytest.mark.parametrize(("max_num_seqs", "batch"), [(1, "2"), (2, "2"), (16, "16")])
def test_the_cards_environment_is_exported(
    monkeypatch: pytest.MonkeyPatch, max_num_seqs: int, batch: str
):
    expected = {
        "VLLM_DT_CHUNK_LEN": "512",
        "VLLM_DT_MAX_CONTEXT_LEN": "4096",
        "VLLM_DT_MAX_BATCH_SIZE": batch,
        "VLLM_DT_MAX_BATCH_TKV_LIMIT": "65536",
    }
    for name in expected:
        monkeypatch.setenv(name, "before")
    environment.export_card_environment(
        chunk_size=512, context_len=4096, max_num_seqs=max_num_seqs, max_batch_tkv=65536
    )
    assert {name: os.environ[name] for name in expected} == expected


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

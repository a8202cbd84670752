# SPDX-License-Identifier: Apache-2.0
"""A hook knows what is its own, whoever else has wrapped vLLM's functions before or after it."""

import functools
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

import vllm_spyre_mm
from vllm_spyre_mm.frontend import hooks, metrics
from vllm_spyre_mm.upstream.marks import extending, is_extended, mark

TARGETS = {
    ("vllm_fixes.mistral_format", "_extend_engine_args", "vllm.engine.arg_utils"): [
        "EngineArgs.create_model_config"
    ],
    ("frontend.async_llm", "_extend_async_llm", "vllm.v1.engine.async_llm"): [
        "AsyncLLM.__init__",
        "AsyncLLM.generate",
    ],
    ("frontend.engine_args", "_extend_engine_args", "vllm.engine.arg_utils"): [
        "EngineArgs.__init__",
        "AsyncEngineArgs.__init__",
    ],
    ("frontend.input_processor", "_extend_input_processor", "vllm.v1.engine.input_processor"): [
        "InputProcessor.process_inputs"
    ],
    ("frontend.output_processor", "_extend_output_processor", "vllm.v1.engine.output_processor"): [
        "OutputProcessor.process_outputs",
        "RequestState._new_completion_output",
    ],
    ("vllm_fixes.sender_cache", "_extend_output_processor", "vllm.v1.engine.output_processor"): [
        "OutputProcessor.add_request"
    ],
    ("vllm_fixes.shutdown_errors", "_extend_async_llm", "vllm.v1.engine.async_llm"): [
        "AsyncLLM.shutdown"
    ],
    ("vllm_fixes.shutdown_errors", "_extend_engine", "vllm.v1.engine.core"): [
        "EngineCoreProc._send_abort_outputs_to_client"
    ],
    (
        "vllm_fixes.shutdown_errors",
        "_extend_entry",
        "vllm.entrypoints.launchers.api_server.entry",
    ): [
        "run_server_worker",
    ],
    ("vllm_fixes.cleanup_without_accelerator", "_clean_up_host_only", "vllm.v1.engine.core"): [
        "cleanup_dist_env_and_memory"
    ],
    ("vllm_fixes.unsupported_operations", "_extend_engine", "vllm.v1.engine.core"): [
        "EngineCore.sleep",
        "EngineCore.release_kv_cache_memory",
    ],
    ("vllm_fixes.unsupported_operations", "_extend_client", "vllm.v1.engine.core_client"): [
        "_process_utility_output"
    ],
}
"""What each action replaces."""


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """What a test replaces, and puts back, is what the platform's entry point leaves."""
    hooks.install()


def owner_of(module: Any, target: str) -> tuple[Any, str]:
    *classes, name = target.split(".")
    return functools.reduce(getattr, classes, module), name


def wrapped_by_somebody(owner: Any, name: str) -> Any:
    """What stands at ``owner.name``, without the hook, in a wrapper that is none of its own."""
    found = vars(owner)[name]
    function = found.__func__ if isinstance(found, classmethod) else found
    original = inspect.unwrap(function, stop=lambda each: not is_ours(each))

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return classmethod(wrapper) if isinstance(found, classmethod) else wrapper


def is_ours(function: Any) -> bool:
    return any(is_extended(function, f"vllm_spyre_mm.{hook}") for hook, *_ in TARGETS)


@pytest.mark.parametrize(("action", "targets"), TARGETS.items(), ids=lambda each: str(each[0]))
def test_what_others_wrapped_is_extended_once(
    action: tuple[str, str, str], targets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = importlib.import_module(f"vllm_spyre_mm.{action[0]}")
    module = importlib.import_module(action[2])
    owners = [owner_of(module, target) for target in targets]
    for cls in {owner for owner, _ in owners if isinstance(owner, type)}:
        if action[0] == "frontend.output_processor" and "returned" in vars(cls):
            monkeypatch.delattr(cls, "returned")
    for owner, name in owners:
        monkeypatch.setattr(owner, name, wrapped_by_somebody(owner, name))
    getattr(hook, action[1])(module)
    once = [getattr(owner, name) for owner, name in owners]
    assert all(is_extended(each, hook.__name__) for each in once)
    for owner, name in owners:
        foreign = functools.wraps(getattr(owner, name))(lambda *args, **kwargs: None)
        monkeypatch.setattr(owner, name, foreign)
    before = [getattr(owner, name) for owner, name in owners]
    getattr(hook, action[1])(module)
    assert [getattr(owner, name) for owner, name in owners] == before


def test_a_logger_of_somebody_is_extended(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.metrics import loggers

    own = next(
        cls for cls in loggers.PrometheusStatLogger.__mro__ if cls.__module__ == loggers.__name__
    )

    class Logger(own):  # type: ignore[misc, valid-type]
        __wrapped__ = own

    monkeypatch.setattr(loggers, metrics.NAME, Logger)
    metrics._replace_logger(loggers)
    extended = loggers.PrometheusStatLogger
    assert issubclass(extended, Logger)
    assert extended is not Logger
    metrics._replace_logger(loggers)
    assert loggers.PrometheusStatLogger is extended


def test_hooks_do_not_know_each_others_marks() -> None:
    def original() -> None: ...

    first = extending(original, "first")(lambda: None)
    both = extending(first, "second")(lambda: None)
    assert is_extended(first, "first")
    assert not is_extended(first, "second")
    assert is_extended(both, "first")
    assert is_extended(both, "second")
    assert not is_extended(original, "first")


def test_a_mark_is_found_below_what_hides_it() -> None:
    class Hiding:
        """A wrapper that copies nothing."""

        def __init__(self, wrapped: Any) -> None:
            self.__wrapped__ = wrapped

    class Derived(mark(type("Base", (), {}), "hook")):  # type: ignore[misc]
        """Of a class that is marked."""

    assert is_extended(Hiding(extending(len, "hook")(lambda: None)), "hook")
    assert is_extended(Derived, "hook")


def test_every_hook_uses_the_mark() -> None:
    """A new one too: what wraps in another way would not know itself."""
    for file in Path(vllm_spyre_mm.__path__[0]).rglob("*.py"):
        if file.name != "marks.py":
            source = file.read_text()
            assert "functools.wraps" not in source, file.name
            assert '"__wrapped__"' not in source, file.name

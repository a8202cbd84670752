# SPDX-License-Identifier: Apache-2.0
"""All hooks are there before an engine starts, or none does."""

from typing import Any

import pytest

from vllm_spyre_mm.frontend import hooks
from vllm_spyre_mm.platform import SpyrePlatform
from vllm_spyre_mm.upstream.contract import UnsupportedVllmError
from vllm_spyre_mm.vllm_fixes import media, parent_watchdog


@pytest.fixture
def once_more() -> None:
    """As in a new process."""
    hooks.install.cache_clear()


@pytest.mark.usefixtures("once_more")
def test_what_failed_fails_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UnsupportedVllmError("no 'MediaConnector'")

    with monkeypatch.context() as patch:
        patch.setattr(media, "install", refuse)
        for _ in range(2):
            with pytest.raises(UnsupportedVllmError, match="no 'MediaConnector'"):
                hooks.install()
    hooks.install()


@pytest.mark.usefixtures("once_more")
def test_what_succeeded_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who wraps vLLM's functions afterwards is not wrapped again."""
    hooks.install()
    monkeypatch.setattr(parent_watchdog, "install", None)
    hooks.install()


def test_an_engine_is_refused_whose_hooks_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM loads its plugins once: a second engine would start without what failed."""

    def refuse() -> None:
        raise UnsupportedVllmError("no 'MediaConnector'")

    monkeypatch.setattr(hooks, "install", refuse)
    config: Any = None
    with pytest.raises(UnsupportedVllmError, match="no 'MediaConnector'"):
        SpyrePlatform.check_and_update_config(config)

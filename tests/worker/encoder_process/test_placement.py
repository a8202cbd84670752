# SPDX-License-Identifier: Apache-2.0
"""Which engines have an encoder's process, and how the host's threads are shared."""

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.environment import THREAD_COUNTS, encoder_environment
from vllm_spyre_mm.worker.encoder_process.placement import has_encoder_process, share_threads


@pytest.mark.parametrize(
    ("threads", "ranks", "of_encoder", "of_rank"),
    [(1, 1, 1, 1), (2, 1, 1, 1), (16, 1, 12, 4), (16, 4, 12, 1), (64, 4, 48, 4), (2, 4, 1, 1)],
)
def test_the_encoder_gets_most_threads_and_nobody_none(
    threads: int, ranks: int, of_encoder: int, of_rank: int
) -> None:
    assert share_threads(threads, ranks) == (of_encoder, of_rank)


def config(limits: dict[str, int], **settings: Any) -> Any:
    given = SpyreSettings(**settings).model_dump()
    multimodal = SimpleNamespace(get_limit_per_prompt=limits.__getitem__)
    model = SimpleNamespace(get_multimodal_config=lambda: multimodal)
    return SimpleNamespace(additional_config=given, model_config=model)


@pytest.mark.parametrize(
    ("settings", "modalities", "limits", "has_one"),
    [
        ({"backend": "sendnn"}, ("image",), {"image": 1}, True),
        ({"backend": "sendnn"}, ("image", "video"), {"image": 0, "video": 2}, True),
        ({"backend": "sendnn"}, ("image", "video"), {"image": 0, "video": 0}, False),
        ({"backend": "sendnn"}, (), {}, False),
        ({"backend": "sendnn", "encode_ahead": False}, ("image",), {"image": 1}, False),
        ({"backend": "inductor"}, ("image",), {"image": 1}, False),
    ],
)
def test_pictures_have_a_process_beside_a_card(
    settings: dict[str, Any], modalities: tuple[str, ...], limits: dict[str, int], has_one: bool
) -> None:
    mapping: Any = SimpleNamespace(modalities=modalities)
    assert has_encoder_process(config(limits, **settings), mapping) is has_one


def test_its_environment_is_this_process_with_its_own_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(sys, "path", ["", "/somewhere"])
    found = encoder_environment(3)
    assert {found.pop(name) for name in THREAD_COUNTS} == {"3"}
    assert found.pop("PYTHONPATH") == os.pathsep.join([os.getcwd(), "/somewhere"])
    assert found.items() <= os.environ.items()
    assert os.environ["OMP_NUM_THREADS"] == "7"

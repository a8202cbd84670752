# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests against the stand-in for the card's compiler."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends import registry

STAND_IN = Path(__file__).parent / "stand_in"


@pytest.fixture(scope="module")
def card() -> Iterator[None]:
    """Makes ``torch_sendnn`` importable, and forgets it and its environment afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STAND_IN))
        for name in ("CHUNK_LEN", "MAX_CONTEXT_LEN", "MAX_BATCH_SIZE", "MAX_BATCH_TKV_LIMIT"):
            patch.setenv(f"VLLM_DT_{name}", "unset")
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_sendnn"]:
        del sys.modules[name]
    for known in (registry._COMPILER_FNS, registry._BACKENDS):
        known.pop("sendnn", None)
    torch._dynamo.reset()

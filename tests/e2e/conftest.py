# SPDX-License-Identifier: Apache-2.0
"""Servers that several files share, and the stand-in for the card's compiler.

Files that share a server run in one process: see ``GROUPS`` in ``tests/processes.py``.
"""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends import registry

from tests.e2e.serving import Served, running_server
from tools.soak.soak import soaked_server

STAND_IN = Path(__file__).parent / "stand_in"

SET_FOR_A_CARD = (
    *("VLLM_DT_CHUNK_LEN", "VLLM_DT_MAX_CONTEXT_LEN", "VLLM_DT_MAX_BATCH_SIZE"),
    *("VLLM_DT_MAX_BATCH_TKV_LIMIT", "SPYRE_MM_BATCH_TKV_LIMIT"),
    *("COMPILATION_MODE", "FLEX_OVERWRITE_NMB_FRAME"),
)
"""What the platform sets in the process of an engine, which is the test's."""


@pytest.fixture(scope="session")
def server(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that takes embeddings for pictures too."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with running_server(demo_checkpoint, log, "--enable-mm-embeds") as address:
        yield address


@pytest.fixture(scope="session")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of few rows and blocks that can be looked into."""
    with soaked_server(tmp_path_factory.mktemp("soaked") / "log.txt") as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture(scope="module")
def card() -> Iterator[None]:
    """Makes ``torch_sendnn`` importable, and forgets it and its environment afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STAND_IN))
        for name in SET_FOR_A_CARD:
            patch.setenv(name, "what is set later goes afterwards")
            patch.delenv(name)
        yield
    for each in (signal.SIGTERM, signal.SIGINT):  # a test may have imported it by itself
        signal.signal(each, signal.getsignal(each))
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_sendnn"]:
        del sys.modules[name]
    for known in (registry._COMPILER_FNS, registry._BACKENDS):
        known.pop("sendnn", None)
    torch._dynamo.reset()

# SPDX-License-Identifier: Apache-2.0
"""How ``make test`` shares the tests out to processes: a plugin beside pytest-xdist.

Few processes run file after file, each of which imports vLLM once. (pytest-xdist's own marks of
groups have no effect with pytest 9.2.)
"""

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

GROUPS = {
    **{
        f"tests/e2e/server_embeddings/test_{name}.py": "server_embeddings"
        for name in ("chat", "images_alone", "metrics", "routes")
    },
    "tests/e2e/test_aborts.py": "soaked",
    "tests/e2e/test_soak.py": "soaked",
    "tests/e2e/test_clients.py": "server",
    "tests/e2e/test_hostile.py": "server",
    "tests/e2e/test_server.py": "server",
    "tests/worker/test_encode_ahead.py": "in_two_ranks",
    "tests/worker/test_ranks.py": "in_two_ranks",
}
"""Files that share a server or other processes, and so run in one process, by the name of the
fixture or of their folder."""


class GroupScheduling(LoadFileScheduling):
    """The tests of a file run in one process, in their order; so do those of a group of files."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return GROUPS.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End-to-end tests come first: what is left to share out at the end is short."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)

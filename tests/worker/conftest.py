# SPDX-License-Identifier: Apache-2.0
"""Processes that several files share: see ``GROUPS`` in ``tests/processes.py``."""

from collections.abc import Iterator

import pytest

from tests.worker.two_ranks import TwoRanks, two_ranks


@pytest.fixture(scope="session")
def in_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """Does a task in each of two ranks."""
    with two_ranks(tmp_path_factory.mktemp("ranks")) as do:
        yield do

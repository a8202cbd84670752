# SPDX-License-Identifier: Apache-2.0
"""Each test looks anew."""

from collections.abc import Iterator

import pytest

from vllm_spyre_mm.doctor.probe import probe


@pytest.fixture
def fresh_probes() -> Iterator[None]:
    """What was found before is forgotten, before the test and after it."""
    probe.cache_clear()
    yield
    probe.cache_clear()

# SPDX-License-Identifier: Apache-2.0
"""Tests of the mappings: :mod:`.suite` is what every mapping has to pass."""

import pytest

pytest.register_assert_rewrite(
    *(f"{__name__}.{suite}" for suite in ("text_suite", "suite", "llava_next_suite"))
)

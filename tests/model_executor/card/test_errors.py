# SPDX-License-Identifier: Apache-2.0
"""Errors whose text is public come with what may help."""

import pytest

from vllm_spyre_mm.model_executor.card.errors import PUBLIC_ERRORS, cure_of


@pytest.mark.parametrize(
    "text", ["Need to find a valid memory space for KV cache", "Must find space in DDR"]
)
def test_errors_of_memory_name_the_flag(text: str) -> None:
    cure = cure_of(f"compile failed: {text} (48 GB)")
    assert cure is not None
    assert "--num-gpu-blocks-override" in cure


def test_nothing_is_known_of_other_texts() -> None:
    assert cure_of("the device is gone") is None
    assert len({error.text for error in PUBLIC_ERRORS}) == len(PUBLIC_ERRORS)

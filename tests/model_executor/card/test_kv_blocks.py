# SPDX-License-Identifier: Apache-2.0
"""The blocks of a card's KV cache: a multiple of the batch, enough for a decode, no more."""

import pytest

from vllm_spyre_mm.model_executor.card.kv_blocks import CardCache


def cache(max_model_len: int, max_num_seqs: int, max_batch_tkv: int = 131072) -> CardCache:
    return CardCache(64, max_model_len, max_num_seqs, max_batch_tkv)


@pytest.mark.parametrize(
    ("limits", "known", "blocks"),
    [
        ((8192, 16), None, 2064),  # 16 rows of 128 blocks and block 0, rounded up
        ((3072, 16), None, 784),
        ((8192, 4), None, 516),
        ((32768, 32), None, 2080),  # bounded by 131,072 tokens
        ((32768, 32), 8192, 8192),
        ((32768, 5), 8192, 8190),
        ((1000, 1, 1000), None, 18),  # 16 blocks and block 0; the batch is two
        ((1000, 3, 2048), None, 33),
    ],
)
def test_the_default(limits: tuple[int, ...], known: int | None, blocks: int) -> None:
    assert cache(*limits).default(known) == blocks


def test_an_override_is_rounded_down() -> None:
    """At a batch of 3, cards took 15 and 18 blocks and failed with 16."""
    three = cache(256, 3)
    assert [three.from_override(given) for given in (15, 16, 17, 18)] == [15, 15, 15, 18]


def test_an_override_that_a_decode_exceeds_is_refused() -> None:
    three = cache(256, 3)
    assert three.useful == 13
    with pytest.raises(ValueError, match=r"leaves 12 blocks, a multiple of 3.*read 13: give 15"):
        three.from_override(14)
    with pytest.raises(ValueError, match="leaves 0 blocks"):
        three.from_override(2)


def test_bytes_are_rounded_down_and_hold_one_sequence() -> None:
    three = cache(256, 3)
    assert three.of_one == 5
    assert three.from_bytes(100 * 8 + 99, 100) == 6
    with pytest.raises(ValueError, match=r"leaves 3 blocks.*needs 5: give 600"):
        three.from_bytes(599, 100)

# SPDX-License-Identifier: Apache-2.0
"""The first rank works for two, which are processes that talk through Gloo."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.serialization import (
    LoadEndianness,
    get_default_load_endianness,
    set_default_load_endianness,
)

from tests.worker.connector_stub import WIDTH, Metadata, Transfer
from tests.worker.test_encoding import image, in_one_piece
from tests.worker.two_ranks import TwoRanks
from vllm_spyre_mm.worker.encoding import ImageEncoder, ImageEncodingError
from vllm_spyre_mm.worker.groups import register_default_group
from vllm_spyre_mm.worker.host_share import read_little_endian
from vllm_spyre_mm.worker.ranks import Ranks


def _values(ranks: Ranks) -> list[list[float]]:
    number = 7 if ranks.is_first else 8
    dtypes = (torch.int64, torch.int32, torch.float32, torch.float16, torch.bfloat16, torch.int8)
    values = [ranks.broadcast(torch.full((2, 1), number, dtype=dtype)) for dtype in dtypes]
    said = ranks.broadcast_object({"number": 9} if ranks.is_first else None)
    return [*(each.flatten().tolist() for each in values), [said["number"]]]


def test_what_the_first_rank_has_the_others_get(in_two_ranks: TwoRanks) -> None:
    first, second = in_two_ranks(_values)
    assert first == second == [[7, 7]] * 6 + [[9]]


def _sum_in_default_group(ranks: Ranks) -> list[Any]:
    world = register_default_group()
    one = torch.ones(1)
    summed = torch.ops._c10d_functional.all_reduce(one, "sum", "default")
    total = torch.ops._c10d_functional.wait_tensor(summed)
    return [world.size(), total.item()]


def test_the_group_of_all_ranks_has_the_name_that_the_card_asks_for(in_two_ranks: TwoRanks) -> None:
    assert in_two_ranks(_sum_in_default_group) == [[2, 2.0]] * 2


def _encode(ranks: Ranks) -> list[Any]:
    """A step whose pictures are encoded, one whose encoder raises or gives NaN, and one more."""
    calls: list[int] = []

    def encode(mm_kwargs: Any) -> list[torch.Tensor]:
        calls.append(torch.get_num_threads())
        if len(calls) == 2:
            raise MemoryError("no")
        value = torch.nan if len(calls) == 3 else len(calls)
        return [torch.full((4, len(each)), value).bfloat16().t() for each in mm_kwargs["pixels"]]

    mapping = SimpleNamespace(feature_width=4)
    model: Any = SimpleNamespace(encode_pieces=in_one_piece(encode), mapping=mapping)
    encoder = ImageEncoder(model, ranks, torch.bfloat16, torch.bfloat16)
    results: list[Any] = []
    for _ in range(4):
        try:
            encoded = encoder.encode({0: image(3, "pixels"), 1: image(2, "pixels")})
            results.append([(each.tolist(), str(each.dtype)) for each in encoded])
        except ImageEncodingError as error:
            results.append(str(error))
    return [results, calls, torch.get_num_threads()]


def test_pictures_are_encoded_once_with_the_threads_of_all(in_two_ranks: TwoRanks) -> None:
    """And one that cannot be encoded fails on both ranks, which go on together."""
    (first, threads, after), (second, none, _) = in_two_ranks(_encode)
    assert first == second
    encoded, raised, nan, again = first
    assert [(len(rows), dtype) for rows, dtype in encoded] == [
        (3, "torch.bfloat16"),
        (2, "torch.bfloat16"),
    ]
    assert raised == "images 1, 2 of the request could not be encoded: MemoryError: no"
    assert "image 1 of the request was encoded to features with NaN" in nan
    assert again[0][0] == [[4.0] * 4] * 3
    assert (threads, none, after) == ([3] * 4, [], 1)


def _transfer_features(ranks: Ranks) -> list[Any]:
    """Steps of requests whose features a connector brings, which only the first rank has."""
    made = Transfer(ranks)
    good, bad = torch.full((3, WIDTH), 7.0), torch.full((2, WIDTH), torch.nan)
    told: list[Any] = []

    def step(*arguments: Any, **more: Any) -> None:
        told.append((made.step(*arguments, **more), made.encoded[-1], sorted(made.cache.items())))

    step(Metadata({"of 3": good, "of 2": bad}), image(3), image(2), image(4))
    step(Metadata({"of 5": torch.ones(5, WIDTH)}), image(5), image(6), asked=(0, 1))
    made.connector.fault = "save"
    step(Metadata(), image(7), image(8, "image_embeds"), asked=(0, 1))
    step(Metadata({"of 7": torch.ones(7, WIDTH)}), image(7))
    made.transfer.cache.clear()
    step(Metadata({"of 3": good}), image(3), image(2))
    return told


def test_what_a_connector_brings_and_takes_is_the_same_on_both_ranks(
    in_two_ranks: TwoRanks,
) -> None:
    """What is damaged or asked for is encoded on both, and what is not saved fails on both."""
    first, second = in_two_ranks(_transfer_features)
    assert first == second
    faults, encoded, caches = zip(*first, strict=True)
    names = [[name for name, _ in cache] for cache in caches]
    assert [fault is None for fault in faults] == [True, True, False, True, False]
    assert list(encoded) == [[1, 2], [0, 1], [0, 1], [], [1]]
    assert names[1] == names[2] == ["of 2", "of 3", "of 4", "of 5", "of 6"]
    assert names[3:] == [[*names[1], "of 7"], ["of 3"]]
    assert caches[0] == [(f"of {n}", [[v] * WIDTH] * n) for n, v in ((2, 1.0), (3, 7.0), (4, 1.0))]


def _sample_or_fail(ranks: Ranks) -> list[Any]:
    """Tokens, an error of the sampler's in their place, one of the encoder's, and tokens again."""

    def sample() -> tuple[torch.Tensor, str]:
        assert ranks.is_first
        return torch.tensor([[5], [0]]), "details"

    def fail(*_: Any) -> Any:
        assert ranks.is_first
        raise KeyError("no")

    class Lost(SimpleNamespace):
        modality, data = "image", {}

        @property
        def mm_position(self) -> Any:
            return fail()

    encode = in_one_piece(lambda _: [torch.zeros(1, 4)])
    model: Any = SimpleNamespace(encode_pieces=encode, mapping=SimpleNamespace(feature_width=4))
    encoder = ImageEncoder(model, ranks, torch.bfloat16, torch.bfloat16)
    results: list[Any] = []
    for work in (
        lambda: ranks.broadcast_tokens(2, sample),
        lambda: ranks.broadcast_tokens(2, fail),
        lambda: encoder.encode({0: Lost()}),  # type: ignore[dict-item]
        lambda: ranks.broadcast_tokens(2, sample),
    ):
        try:
            token_ids, details = work()
            results.append((token_ids.tolist(), details))
        except Exception as error:
            results.append((type(error).__name__, str(error)))
    return results


def test_what_fails_on_the_first_rank_fails_on_the_others_at_once(in_two_ranks: TwoRanks) -> None:
    first, second = in_two_ranks(_sample_or_fail)
    told = ("FirstRankError", "the first rank, which works for all, failed: KeyError: 'no'")
    assert first == [([[5], [0]], "details"), *[("KeyError", "'no'")] * 2, ([[5], [0]], "details")]
    assert second == [([[5], [0]], None), told, told, ([[5], [0]], None)]


@pytest.mark.parametrize("num_threads", [None, 3])
def test_one_rank_needs_nobody(num_threads: int | None) -> None:
    ranks = Ranks(num_threads=num_threads)
    assert ranks.is_first
    assert ranks.broadcast(torch.ones(2)).tolist() == [1, 1]
    assert ranks.broadcast_object("said") == "said"


@pytest.mark.parametrize("order", ["little", "big"])
def test_a_big_endian_host_reads_files_as_the_others_write_them(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: what PyTorch is told where the host's order is another one."""
    monkeypatch.setattr(sys, "byteorder", order)
    try:
        read_little_endian()
        expected = LoadEndianness.LITTLE if order == "big" else None
        assert get_default_load_endianness() == expected
    finally:
        set_default_load_endianness(None)

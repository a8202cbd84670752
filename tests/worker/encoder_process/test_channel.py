# SPDX-License-Identifier: Apache-2.0
"""Messages between two processes arrive as they were sent, and leave nothing behind."""

import gc
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from vllm_spyre_mm.worker.encoder_process.channel import ALIGNMENT, Channel, channel_pair

TENSORS = {
    "bf16": torch.randn(3, 5).bfloat16(),
    "no elements": torch.empty(0, 4),
    "one number": torch.tensor(3),
    "a view": torch.arange(12).view(3, 4).T[1:],
    "booleans": torch.tensor([True, False, True]),
}


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mapped_memory() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:encoder")


def send(message: Any, pair: tuple[Channel, Channel] | None = None) -> Any:
    one, other = pair or channel_pair()
    one.send(message)
    return other.receive()


def test_tensors_of_every_kind_arrive() -> None:
    received = send({"tensors": TENSORS, "else": [1, "two", None]})
    assert received["else"] == [1, "two", None]
    for name, sent in TENSORS.items():
        found = received["tensors"][name]
        assert (found.dtype, found.shape) == (sent.dtype, sent.shape), name
        assert torch.equal(found, sent), name
        assert not found.numel() or found.data_ptr() % ALIGNMENT == 0, name


def test_a_picture_arrives_as_vllm_has_it() -> None:
    element = MultiModalFieldElem(data=TENSORS["bf16"], field=MultiModalBatchedField())
    picture = MultiModalFeatureSpec(
        data=MultiModalKwargsItem({"pixel_values": element}),
        modality="image",
        identifier="a hash",
        mm_position=PlaceholderRange(3, 4, torch.tensor([True, False, True, True])),
    )
    (received,) = send([picture])
    assert received.mm_position.get_num_embeds() == 3
    assert torch.equal(received.data["pixel_values"].data, TENSORS["bf16"])
    assert received.identifier == "a hash"


def test_what_was_sent_before_an_end_closed_is_received() -> None:
    one, other = channel_pair()
    assert not other.poll()
    one.send(1)
    one.send(2)
    one.close()
    assert other.poll()
    assert [other.receive(), other.receive()] == [1, 2]
    with pytest.raises(EOFError):
        other.receive()
    with pytest.raises(ConnectionError):
        other.send(3)


def test_an_end_that_closed_with_messages_unread_has_said_what_it_said_before() -> None:
    one, other = channel_pair()
    one.send(1)
    other.send(2)
    other.close()
    assert one.receive() == 2
    with pytest.raises(EOFError):
        one.receive()


@pytest.mark.parametrize("spare", [0, 1])
def test_a_message_for_which_there_is_no_descriptor_is_an_error(spare: int) -> None:
    """One comes with it, and mapping its memory takes another one for a moment."""
    one, other = channel_pair()
    one.send(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as first_free:
        limit = first_free.fileno() + spare
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"no file descriptor is left|the memory .* to be had"):
            other.receive()
        if not spare:
            with pytest.raises(OSError, match="Too many open files"):
                other.send(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    one.send(2)
    assert other.receive() == 2


def test_large_messages_do_not_wait_for_the_receiver() -> None:
    pair = channel_pair()
    for number in range(4):
        pair[0].send(torch.full((1 << 22,), number))
    for number in range(4):
        assert int(pair[1].receive()[-1]) == number


def test_nothing_stays_open_or_mapped() -> None:
    pair = channel_pair()
    gc.collect()  # of other tests
    opened, mapped = open_descriptors(), mapped_memory()
    received = send(TENSORS, pair)
    assert open_descriptors() == opened
    assert mapped_memory() == mapped + 1
    part = received["bf16"]
    del received
    gc.collect()
    assert mapped_memory() == mapped + 1, "a tensor lies in it"
    assert torch.equal(part, TENSORS["bf16"])
    del part
    gc.collect()
    assert mapped_memory() == mapped

# SPDX-License-Identifier: Apache-2.0
"""What the worker does of encoding beside the steps, alone and with another rank."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from tests.worker.test_encoding import image
from tests.worker.two_ranks import TwoRanks
from vllm_spyre_mm.multimodal.encoder_cache import EncoderCache
from vllm_spyre_mm.scheduler.outputs import (
    EncodingDone,
    SpyreModelRunnerOutput,
    SpyreSchedulerOutput,
)
from vllm_spyre_mm.worker.encode_ahead import AheadEncoding
from vllm_spyre_mm.worker.encode_queue import EncodedImage
from vllm_spyre_mm.worker.ranks import Ranks


class Queue:
    """Gives an image for each call; notes the calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.images: list[MultiModalFeatureSpec] = []

    def cancel(self, identifiers: Iterable[str]) -> None:
        self.calls.append(("cancel", *identifiers))
        self.images = [each for each in self.images if each.identifier not in set(identifiers)]

    def submit(self, images: "Sequence[MultiModalFeatureSpec]") -> None:
        self.calls.append(("submit", *(each.identifier for each in images)))
        self.images += images

    def advance(self, *, idle: bool) -> list[EncodedImage]:
        self.calls.append(("advance", idle))
        first = self.images.pop(0)
        if first.identifier == "of 2":
            return [EncodedImage("of 2", None, "could not be encoded")]
        if first.identifier == "of 7":
            raise KeyError("no")
        rows = torch.full((4, first.mm_position.length), 3.0).bfloat16().t()
        return [EncodedImage(first.identifier, rows)]

    def close(self) -> None:
        self.calls.append("close")


OWN = SchedulerOutput.make_empty()
"""vLLM's own message, which comes while no image is asked for."""


def message(
    *images: MultiModalFeatureSpec, cancelled: Sequence[str] = (), may_encode: bool = True
) -> SpyreSchedulerOutput:
    return SpyreSchedulerOutput(
        **vars(SchedulerOutput.make_empty()),
        cancelled_images=list(cancelled),
        images_to_encode=list(images),
        may_encode=may_encode,
    )


def test_images_that_are_done_are_in_the_cache_and_on_the_next_output() -> None:
    queue, cache = Queue(), EncoderCache()
    ahead = AheadEncoding(queue, Ranks())
    ahead.step(message(image(3), image(2)), cache)
    assert queue.calls == [("cancel",), ("submit", "of 3", "of 2"), ("advance", True)]
    assert "of 3" in cache
    ahead.step(message(), cache)
    assert "of 2" not in cache
    output = ahead.attach(EMPTY_MODEL_RUNNER_OUTPUT)
    assert isinstance(output, SpyreModelRunnerOutput)
    assert output.encodings_done == [
        EncodingDone("of 3", None),
        EncodingDone("of 2", "could not be encoded"),
    ]
    assert type(EMPTY_MODEL_RUNNER_OUTPUT) is ModelRunnerOutput
    later = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    assert ahead.attach(later) is later


def test_nothing_takes_time_of_a_step_that_has_none_to_give() -> None:
    queue, cache = Queue(), EncoderCache()
    ahead = AheadEncoding(queue, Ranks())
    ahead.step(message(image(3), may_encode=False), cache)
    assert ("advance", True) not in queue.calls
    ahead.step(message(), cache)
    ahead.step(message(), cache)  # nothing is asked for any more
    assert queue.calls.count(("advance", True)) == 1


def test_a_queue_that_takes_no_time_is_asked_in_every_step() -> None:
    queue, cache = Queue(), EncoderCache()
    ahead = AheadEncoding(queue, Ranks(), in_every_step=True)
    output = message(image(3), may_encode=False)
    output.total_num_scheduled_tokens = 5
    ahead.step(output, cache)
    assert queue.calls[-1] == ("advance", False)
    ahead.close()
    assert queue.calls[-1] == "close"


class Replacing(Queue):
    """Has something to put right while nothing is asked for, which fails the second time."""

    def advance(self, *, idle: bool) -> list[EncodedImage]:
        if self.images:
            return super().advance(idle=idle)
        self.calls.append(("advance", idle))
        if self.calls.count(("advance", False)) == 2:
            raise KeyError("no")
        return []


def test_such_a_queue_is_asked_while_nothing_is_asked_for_too() -> None:
    """It may have a process that ended, and that is to be replaced before anybody waits for it."""
    queue, cache = Replacing(), EncoderCache()
    ahead = AheadEncoding(queue, Ranks(), in_every_step=True)
    ahead.step(OWN, cache)
    assert queue.calls == [("advance", False)]
    with pytest.raises(KeyError):
        ahead.step(message(), cache)
    in_pieces = Queue()
    AheadEncoding(in_pieces, Ranks()).step(OWN, cache)
    assert not in_pieces.calls


def test_features_that_do_not_fit_the_placeholder_are_a_fault_of_the_image() -> None:
    """Where a caller gave two images one identifier, for instance."""
    queue, cache = Queue(), EncoderCache()
    ahead = AheadEncoding(queue, Ranks())
    other = replace(image(3), mm_position=PlaceholderRange(0, 5))
    queue.advance = lambda *, idle: [EncodedImage("of 3", torch.zeros(3, 4))]  # type: ignore[method-assign]
    ahead.step(message(other), cache)
    assert "of 3" not in cache
    (done,) = ahead.attach(EMPTY_MODEL_RUNNER_OUTPUT).encodings_done  # type: ignore[attr-defined]
    sentence = "features of shape (3, 4), but its placeholder in the prompt has 5 positions"
    assert done.fault == f"was encoded to {sentence}"


def _steps(ranks: Ranks) -> list[Any]:
    """Images that are done, one that cannot be encoded, one cancelled, and a queue that fails."""
    cache = EncoderCache()
    queue = Queue() if ranks.is_first else None
    ahead = AheadEncoding(queue, ranks)
    results: list[Any] = []
    for output in (
        OWN,
        message(image(3), image(2)),
        message(image(4), cancelled=[]),
        message(cancelled=["of 4"]),
        message(image(5)),
    ):
        ahead.step(output, cache)
        done: Any = ahead.attach(EMPTY_MODEL_RUNNER_OUTPUT)
        results.append(
            [(each.identifier, each.fault) for each in getattr(done, "encodings_done", [])]
        )
    results.append([cache.get(image(length)).tolist() for length in (3, 5)])
    try:
        ahead.step(message(image(7)), cache)
    except Exception as error:
        results.append(type(error).__name__)
    return results


def test_two_ranks_have_the_same_images_at_the_same_steps(in_two_ranks: TwoRanks) -> None:
    first, second = in_two_ranks(_steps)
    rows = [[[3.0] * 4] * length for length in (3, 5)]
    done = [[], [("of 3", None)], [("of 2", "could not be encoded")], [], [("of 5", None)], rows]
    assert first == [*done, "KeyError"]
    assert second == [*done, "FirstRankError"]


@pytest.mark.parametrize("features", [torch.zeros(3, 4), None])
def test_what_is_done_joins_what_a_step_says_itself(features: torch.Tensor | None) -> None:
    ahead = AheadEncoding(Queue(), Ranks())
    ahead.step(message(image(3)), EncoderCache())
    own = SpyreModelRunnerOutput(
        req_ids=["a"],
        req_id_to_index={"a": 0},
        mm_embeddings={} if features is None else {"a": features},
    )
    assert ahead.attach(own) is own
    assert own.encodings_done == [EncodingDone("of 3", None)]

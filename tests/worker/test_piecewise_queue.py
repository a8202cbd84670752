# SPDX-License-Identifier: Apache-2.0
"""Encoding in pieces: what a piece is, which images go together, and whose fault a failure is."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec

from tests.worker.test_encoding import image
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.worker.encode_queue import EncodedImage
from vllm_spyre_mm.worker.piecewise_queue import PIECE_SECONDS, PiecewiseEncodeQueue

LAYERS = 4


class Tower:
    """A pretended encoder of four layers; counts them, and fails at images of some lengths.

    Attributes:
        layers: for each layer the number of images in it.
        seconds: of the pretended clock.
        layer_seconds: of a layer.
    """

    def __init__(self, batch_values: int = 1000) -> None:
        self.mapping = SimpleNamespace(feature_width=4, encoder_batch_values=batch_values)
        self.layers: list[int] = []
        self.seconds, self.layer_seconds = 0.0, PIECE_SECONDS
        self.raises: set[int] = set()
        self.nan: set[int] = set()

    def encode_pieces(self, mm_kwargs: Any) -> Pieces[list[torch.Tensor]]:
        (images,) = mm_kwargs.values()
        lengths = [len(rows) for rows in images]
        for _ in range(LAYERS):
            self.layers.append(len(lengths))
            self.seconds += self.layer_seconds
            if self.raises & set(lengths):
                raise MemoryError("no")
            yield
        return [
            torch.full((length, 4), torch.nan if length in self.nan else float(length))
            for length in lengths
        ]


def queue_of(tower: Tower) -> PiecewiseEncodeQueue:
    served: Any = tower
    return PiecewiseEncodeQueue(served, torch.bfloat16, torch.bfloat16, clock=lambda: tower.seconds)


def drain(queue: PiecewiseEncodeQueue) -> list[EncodedImage]:
    done: list[EncodedImage] = []
    for _ in range(100):
        done += queue.advance(idle=False)
    return done


def names(done: list[EncodedImage]) -> list[str]:
    return [each.identifier for each in done]


def test_a_piece_is_one_layer_where_layers_are_long() -> None:
    tower = Tower()
    queue = queue_of(tower)
    queue.submit([image(3)])
    for layer in range(LAYERS):
        assert queue.advance(idle=False) == []
        assert len(tower.layers) == layer + 1
    (done,) = queue.advance(idle=False)
    assert (done.identifier, done.fault) == ("of 3", None)
    assert done.features is not None
    assert done.features.dtype == torch.bfloat16
    assert done.features.tolist() == [[3.0] * 4] * 3
    assert queue.advance(idle=True) == []


def test_a_piece_is_several_layers_where_they_are_short() -> None:
    """And none goes on after an image is done, which somebody waits for."""
    tower = Tower(batch_values=0)
    tower.layer_seconds = 0.6 * PIECE_SECONDS
    queue = queue_of(tower)
    queue.submit([image(3), image(2)])
    counts = []
    for _ in range(6):
        queue.advance(idle=False)
        counts.append(len(tower.layers))
    assert counts == [2, 4, 4, 6, 8, 8]


def test_images_go_together_up_to_what_fills_a_pass() -> None:
    """In order, and of one kind."""
    tower = Tower(batch_values=24)  # of 4 values a row
    queue = queue_of(tower)
    video = image(2, "pixel_values_videos", "video")
    queue.submit([image(3), image(2), image(4), image(9), video, image(1)])
    assert len(drain(queue)) == 6
    assert tower.layers[::LAYERS] == [2, 1, 1, 1, 1]


def test_where_an_image_is_a_pass_each_is_encoded_alone() -> None:
    tower = Tower(batch_values=0)
    queue = queue_of(tower)
    queue.submit([image(3), image(2)])
    assert names(drain(queue)) == ["of 3", "of 2"]
    assert tower.layers == [1] * 2 * LAYERS


def test_of_images_that_go_together_only_the_faulty_one_fails() -> None:
    tower = Tower()
    tower.raises = {2}
    queue = queue_of(tower)
    queue.submit([image(3), image(2), image(4)])
    done = {each.identifier: each for each in drain(queue)}
    assert done["of 2"].fault == "could not be encoded: MemoryError: no"
    assert done["of 2"].features is None
    assert [done[name].fault for name in ("of 3", "of 4")] == [None, None]


@pytest.mark.parametrize("together", [False, True])
def test_features_that_are_refused_are_the_fault_of_one(together: bool) -> None:
    tower = Tower(1000 if together else 0)
    tower.nan = {2}
    queue = queue_of(tower)
    queue.submit([image(3), image(2)])
    done = {each.identifier: each.fault for each in drain(queue)}
    assert done["of 3"] is None
    assert str(done["of 2"]).startswith("was encoded to features with NaN or infinity in bfloat16")


def test_given_features_are_converted() -> None:
    tower = Tower()
    queue = queue_of(tower)
    queue.submit([image(3, "image_embeds")])
    (done,) = drain(queue)
    assert done.features is not None
    assert done.features.dtype == torch.bfloat16
    assert not tower.layers


def submitted(*lengths: int) -> tuple[Tower, PiecewiseEncodeQueue]:
    tower = Tower()
    queue = queue_of(tower)
    queue.submit([image(length) for length in lengths])
    queue.advance(idle=False)
    return tower, queue


def test_a_batch_ends_when_nobody_wants_any_image_of_it() -> None:
    tower, queue = submitted(3, 2)
    queue.cancel(["of 3"])
    queue.advance(idle=False)
    assert tower.layers == [2, 2]
    queue.cancel(["of 2"])
    assert drain(queue) == []
    assert tower.layers == [2, 2]


def test_a_cancelled_image_of_a_batch_is_not_returned() -> None:
    """Unless it is asked for again, and encoded again."""
    tower, queue = submitted(3, 2)
    again: MultiModalFeatureSpec = image(3)
    queue.cancel(["of 3"])
    queue.submit([again])
    assert names(drain(queue)) == ["of 2", "of 3"]
    assert tower.layers == [2] * LAYERS + [1] * LAYERS


def test_a_cancelled_image_that_waits_is_not_begun() -> None:
    tower = Tower(batch_values=0)
    queue = queue_of(tower)
    queue.submit([image(3), image(2), image(4)])
    queue.cancel(["of 2", "unknown"])
    assert names(drain(queue)) == ["of 3", "of 4"]


def test_a_closed_queue_does_nothing() -> None:
    tower, queue = submitted(3, 2)
    queue.close()
    assert drain(queue) == []
    assert tower.layers == [2]

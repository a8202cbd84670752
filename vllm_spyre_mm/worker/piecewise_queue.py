# SPDX-License-Identifier: Apache-2.0
"""The queue of images of a CPU, whose cores the decoder wants too: encodes in pieces between steps.

Pictures of several requests go through the encoder together as long as they fit one pass of it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.model_executor.model import SpyreModel
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.multimodal.feature_check import FeatureError, check_item
from vllm_spyre_mm.multimodal.item_tensors import num_values
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils
from vllm_spyre_mm.worker.encode_queue import EncodedImage
from vllm_spyre_mm.worker.encoding import (
    encode_pieces,
    threads,
)

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

logger = get_logger(__name__)

PIECE_SECONDS = 0.2
"""After so long a piece ends with the layer that is under way.

Much longer than a decode, so that few decodes of a batch that is not full yet come in between; as
long as a pause in a stream that a reader hardly sees."""


class PiecewiseEncodeQueue:
    """Encodes on the calling thread, a piece at a time.

    Args:
        model: with the vision encoder.
        dtype: of the encoder and of the features.
        decoder_dtype: what the features are converted to when they are merged.
        num_threads: of PyTorch's operators while it encodes; None for as many as there are.
        clock: seconds; a piece lasts until :data:`PIECE_SECONDS` of them have passed.
    """

    def __init__(
        self,
        model: SpyreModel[MMUtils],
        dtype: torch.dtype,
        decoder_dtype: torch.dtype,
        num_threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._dtype, self._decoder_dtype = dtype, decoder_dtype
        self._num_threads, self._clock = num_threads, clock
        self._waiting: deque[MultiModalFeatureSpec] = deque()
        self._alone: deque[MultiModalFeatureSpec] = deque()  # of batches that failed
        self._batch: list[MultiModalFeatureSpec] = []
        self._pieces: Pieces[list[torch.Tensor]] | None = None
        self._cancelled: set[str] = set()  # of the batch

    def cancel(self, identifiers: Iterable[str]) -> None:
        """See :class:`EncodeQueue`; a batch ends when nobody wants any image of it."""
        cancelled = set(identifiers)
        for queue in (self._alone, self._waiting):
            kept = [image for image in queue if image.identifier not in cancelled]
            queue.clear()
            queue.extend(kept)
        batch = {image.identifier for image in self._batch}
        self._cancelled |= cancelled & batch
        if batch and self._cancelled == batch:
            self._end_batch()

    def submit(self, images: "Sequence[MultiModalFeatureSpec]") -> None:
        """See :class:`EncodeQueue`."""
        self._waiting.extend(images)

    def advance(self, *, idle: bool) -> list[EncodedImage]:
        """Encode a piece, or until a batch is done; see :class:`EncodeQueue`."""
        until = self._clock() + PIECE_SECONDS
        with threads(self._num_threads):
            while self._pieces is not None or self._begin_batch():
                done = self._advance_batch()
                if done or self._clock() >= until:
                    return done
        return []

    def close(self) -> None:
        """See :class:`EncodeQueue`."""
        self._alone.clear()
        self._waiting.clear()
        self._end_batch()

    # -- batches ------------------------------------------------------------------------------

    def _begin_batch(self) -> bool:
        """Begin to encode the next images; False if there are none."""
        self._batch = list(self._take())
        if not self._batch:
            return False
        self._pieces = encode_pieces(self._model, self._batch, self._dtype)
        return True

    def _take(self) -> "Iterator[MultiModalFeatureSpec]":
        if self._alone:
            yield self._alone.popleft()
            return
        room, first = self._model.mapping.encoder_batch_values, True
        modality = self._waiting[0].modality if self._waiting else None
        while self._waiting and self._waiting[0].modality == modality:
            room -= num_values(self._waiting[0])
            if room < 0 and not first:
                return
            yield self._waiting.popleft()
            first = False

    def _end_batch(self) -> "list[MultiModalFeatureSpec]":
        """Drop the batch; returns the images of it that are still wanted."""
        wanted = [image for image in self._batch if image.identifier not in self._cancelled]
        if self._pieces is not None:
            self._pieces.close()
        self._pieces, self._batch, self._cancelled = None, [], set()
        return wanted

    def _advance_batch(self) -> list[EncodedImage]:
        """Encode up to the end of a layer; returns the images of the batch if that was the last."""
        assert self._pieces is not None, "a batch has begun"
        try:
            next(self._pieces)
            return []
        except StopIteration as end:
            encoded = list(zip(self._batch, end.value, strict=True))
            kept = {image.identifier for image in self._end_batch()}
            return [self._checked(*each) for each in encoded if each[0].identifier in kept]
        except Exception as error:  # a vision tower may raise anything
            logger.exception("%d images could not be encoded", len(self._batch))
            wanted = self._end_batch()
            if len(wanted) > 1:
                self._alone.extend(wanted)  # one of them may be to blame for all
                return []
            fault = f"could not be encoded: {type(error).__name__}: {error}"
            return [EncodedImage(image.identifier, None, fault) for image in wanted]

    def _checked(self, image: "MultiModalFeatureSpec", features: torch.Tensor) -> EncodedImage:
        try:
            check_item(image, features, self._model.mapping.feature_width, self._decoder_dtype)
        except FeatureError as error:
            logger.warning("An image was encoded to %s", error)
            return EncodedImage(image.identifier, None, f"was encoded to {error}")
        return EncodedImage(image.identifier, features)

# SPDX-License-Identifier: Apache-2.0
"""The worker's part of encoding beside the steps: does what the scheduler says, on every rank."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_spyre_mm.multimodal.encoder_cache import EncoderCache
from vllm_spyre_mm.multimodal.feature_check import FeatureError, check_count
from vllm_spyre_mm.scheduler.outputs import (
    EncodingDone,
    SpyreModelRunnerOutput,
    SpyreSchedulerOutput,
)
from vllm_spyre_mm.worker.encode_queue import EncodedImage, EncodeQueue
from vllm_spyre_mm.worker.ranks import FirstRankError, Ranks

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


class AheadEncoding:
    """Encodes on the first rank what the scheduler asks for ahead of time.

    Args:
        queue: encodes; None on the other ranks.
        ranks: of the model; all of them put the features into their caches in the same step.
        in_every_step: whether the queue takes no time of a step, so that it is asked in each, also
            while no image is asked for.
    """

    def __init__(
        self, queue: EncodeQueue | None, ranks: Ranks, in_every_step: bool = False
    ) -> None:
        self._queue, self._ranks, self._in_every_step = queue, ranks, in_every_step
        self._asked: dict[str, MultiModalFeatureSpec] = {}
        self._done: list[EncodingDone] = []

    def step(self, scheduler_output: SchedulerOutput, cache: EncoderCache) -> None:
        """Do a step's part of the encoding; called on every rank, before the step.

        Args:
            scheduler_output: of the step; where it is vLLM's own nothing is asked for or cancelled.
            cache: takes the features of images that are done.

        Raises:
            FirstRankError: on the others, as soon as anything was raised on the first while an
                image was asked for.
        """
        may_encode = self._in_every_step
        if isinstance(scheduler_output, SpyreSchedulerOutput):
            self._take(scheduler_output.cancelled_images, scheduler_output.images_to_encode)
            may_encode |= scheduler_output.may_encode
        if self._asked and may_encode:
            idle = scheduler_output.total_num_scheduled_tokens == 0
            for encoded in self._advance(idle):
                self._put(self._asked.pop(encoded.identifier), encoded, cache)
        elif self._queue is not None and self._in_every_step:
            done = self._queue.advance(idle=False)  # it may have something to put right
            assert not done, "nothing is asked for"

    def attach(self, output: ModelRunnerOutput) -> ModelRunnerOutput:
        """A step's output with what is done since the last one."""
        if not self._done:
            return output
        output = SpyreModelRunnerOutput.of(output)
        output.encodings_done, self._done = self._done, []
        return output

    def close(self) -> None:
        """End what encodes."""
        if self._queue is not None:
            self._queue.close()

    def _take(self, cancelled: Sequence[str], images: "Sequence[MultiModalFeatureSpec]") -> None:
        """Note what nobody wants any more, and then what is asked for."""
        for identifier in cancelled:
            self._asked.pop(identifier, None)
        self._asked |= {image.identifier: image for image in images}
        if self._queue is not None:
            self._queue.cancel(cancelled)
            self._queue.submit(images)

    def _put(
        self, image: "MultiModalFeatureSpec", encoded: EncodedImage, cache: EncoderCache
    ) -> None:
        """Note that an image is done, and keep its features if they fit its placeholder."""
        fault = encoded.fault
        if encoded.features is not None:
            try:
                check_count(encoded.features, image.mm_position.get_num_embeds())
                cache.put(image, encoded.features)
            except FeatureError as error:
                fault = f"was encoded to {error}"
        self._done.append(EncodingDone(image.identifier, fault))

    def _advance(self, idle: bool) -> list[EncodedImage]:
        if self._queue is None:
            said: list[tuple[str, str | None]] | Exception = self._ranks.broadcast_object()
            if isinstance(said, Exception):
                raise said
            tensors = iter(self._ranks.receive_tensors() if said else ())
            return [
                EncodedImage(identifier, None if fault else next(tensors), fault)
                for identifier, fault in said
            ]
        try:
            done = self._queue.advance(idle=idle)
        except Exception as error:  # the other ranks wait for it
            self._ranks.broadcast_object(FirstRankError.of(error))
            raise
        self._ranks.broadcast_object([(image.identifier, image.fault) for image in done])
        if done:
            self._ranks.send_tensors(
                [image.features for image in done if image.features is not None]
            )
        return done

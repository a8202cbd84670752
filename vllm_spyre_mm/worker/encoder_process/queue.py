# SPDX-License-Identifier: Apache-2.0
"""The queue of pictures before the encoder's process, which it watches and replaces."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.multimodal.item_tensors import num_values
from vllm_spyre_mm.worker.encode_queue import EncodedImage
from vllm_spyre_mm.worker.encoder_process.parent import EncoderProcess, ProcessFault

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

logger = get_logger(__name__)

START_SECONDS = 300.0
"""For a process to load the encoder and to compile it."""

MAX_STARTS = 3
"""Processes that may fail one after the other before they are ready."""

BATCHES_AHEAD = 2
"""Batches that a process has at a time: one under way, and one so that it never waits."""

IDLE_SECONDS = 0.02
"""How long a step without anything else to do waits for the process."""


class EncoderProcessError(RuntimeError):
    """No process can be had that encodes pictures."""


class ProcessEncodeQueue:
    """Pictures in the order in which they were asked for, encoded in a process of its own.

    A process may end or hang over a picture. If the batch that was under way has several, each of
    them is tried once more, alone; one that was alone fails. Those behind them are encoded by the
    next process.

    Args:
        batch_values: numbers in the tensors of the pictures that are encoded together, at most; a
            single picture may have more.
        timeout: seconds within which a process has to say something while it encodes.
    """

    def __init__(self, batch_values: int, timeout: float) -> None:
        self._batch_values, self._timeout = batch_values, timeout
        self._start: Callable[[], EncoderProcess] | None = None
        self._present: EncoderProcess | None = None
        self._failed_starts = 0
        self._waiting: deque[MultiModalFeatureSpec] = deque()
        self._sent: deque[list[MultiModalFeatureSpec]] = deque()
        self._unwanted: set[str] = set()
        self._suspects: set[str] = set()

    def start(self, start: Callable[[], EncoderProcess]) -> None:
        """Start a process, and wait until it can encode; :meth:`advance` may come after that.

        Args:
            start: starts one; called again for each that takes the place of another.

        Raises:
            EncoderProcessError: the process failed; no other is tried.
        """
        started = time.monotonic()
        self._start, self._present = start, start()
        while not self._process.ready:
            self._process.wait(1.0)
            try:
                received = [*self._receive()]
            except ProcessFault as fault:
                self._process.kill()
                raise EncoderProcessError(f"the vision encoder's process {fault}") from None
            assert not received, "it was sent no pictures"
        elapsed = time.monotonic() - started
        logger.info("The vision encoder is ready in process %d, after %.1f s", self.pid, elapsed)

    @property
    def pid(self) -> int:
        """The process id of the present process."""
        return self._process.pid

    @property
    def _process(self) -> EncoderProcess:
        assert self._present is not None, "start comes first"
        return self._present

    def cancel(self, identifiers: Iterable[str]) -> None:
        """Have pictures not encoded, or not returned, whose requests are gone."""
        gone = set(identifiers)
        self._suspects -= gone
        self._waiting = deque(each for each in self._waiting if each.identifier not in gone)
        self._unwanted |= gone & {each.identifier for each in chain(*self._sent)}

    def submit(self, images: "Sequence[MultiModalFeatureSpec]") -> None:
        """Have pictures encoded, each of which :meth:`advance` returns once."""
        for image in images:
            if image.identifier in self._unwanted:  # it is on its way already
                self._unwanted.remove(image.identifier)
            else:
                self._waiting.append(image)

    def advance(self, *, idle: bool) -> list[EncodedImage]:
        """Pictures that became ready, or failed, since the last call.

        Args:
            idle: whether there is nothing else to do, so that it may wait a little.

        Raises:
            EncoderProcessError: processes fail again and again.
        """
        if idle and (self._sent or self._waiting):
            self._process.wait(IDLE_SECONDS)
        encoded = []
        try:
            for each in self._receive():
                encoded.append(each)
        except ProcessFault as fault:
            encoded += self._replace(fault)
        self._send()
        return encoded

    def close(self) -> None:
        """End the process, if one was started; what is under way is lost."""
        if self._present is not None:
            self._present.end()

    # -- the process --------------------------------------------------------------------------

    def _receive(self) -> Iterator[EncodedImage]:
        for encoded in self._process.receive():
            self._forget(encoded.identifier)
            if encoded.identifier in self._unwanted:
                self._unwanted.remove(encoded.identifier)
            else:
                yield encoded
        silent = time.monotonic() - self._process.last_heard
        if not self._process.ready and silent > START_SECONDS:
            raise ProcessFault(f"was not ready within {START_SECONDS:g} s")
        if self._process.ready and self._sent and silent > self._timeout:
            raise ProcessFault(
                f"did not encode a batch within {self._timeout:g} s (encode_timeout_seconds)"
            )

    def _send(self) -> None:
        """Keep the process busy."""
        while self._process.ready and self._waiting and len(self._sent) < BATCHES_AHEAD:
            batch = self._next_batch()
            if not self._sent:
                self._process.last_heard = time.monotonic()
            self._process.send(batch)
            self._sent.append(batch)

    def _next_batch(self) -> "list[MultiModalFeatureSpec]":
        first = self._waiting.popleft()
        batch, room = [first], self._batch_values - num_values(first)
        while self._waiting and first.identifier not in self._suspects:
            room -= num_values(self._waiting[0])
            if room < 0 or self._waiting[0].identifier in self._suspects:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _replace(self, fault: ProcessFault) -> list[EncodedImage]:
        """Start another process; returns the pictures that failed with the last one.

        Raises:
            EncoderProcessError: too many have failed before they were ready.
        """
        self._failed_starts = 0 if self._process.ready else self._failed_starts + 1
        self._process.kill()
        if self._failed_starts == MAX_STARTS:
            raise EncoderProcessError(
                f"the vision encoder's process failed {MAX_STARTS} times in a row before it was "
                f"ready; the last one {fault}"
            )
        logger.error("The vision encoder's process %s: another one is started", fault)
        sent = [[each for each in batch if self._is_wanted(each)] for batch in self._sent]
        failed = sent.pop(0) if sent else []
        if len(failed) > 1:
            self._suspects |= {each.identifier for each in failed}
            sent.insert(0, failed)
            failed = []
        self._waiting.extendleft(reversed([*chain(*sent)]))
        self._sent.clear()
        self._unwanted.clear()
        assert self._start is not None, "start comes first"
        self._present = self._start()
        reason = f"could not be encoded: the vision encoder's process {fault}"
        return [EncodedImage(each.identifier, None, reason) for each in failed]

    def _forget(self, identifier: str) -> None:
        """Note that a picture of the batch under way is done."""
        batch = [each for each in self._sent[0] if each.identifier != identifier]
        self._suspects.discard(identifier)
        if batch:
            self._sent[0] = batch
        else:
            self._sent.popleft()

    def _is_wanted(self, image: "MultiModalFeatureSpec") -> bool:
        return image.identifier not in self._unwanted

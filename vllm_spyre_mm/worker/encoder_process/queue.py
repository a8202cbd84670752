# SPDX-License-Identifier: Apache-2.0
"""The queue of pictures before the encoder's process, which it watches and replaces."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
"""Processes that may fail one after the other before they are ready, or not be had at all."""

REFUSED_SECONDS = 1.0
"""Until a process is asked for again that the system refused, for want of memory for instance."""

BATCHES_AHEAD = 2
"""Batches that a process has at a time: one under way, and one so that it never waits."""

IDLE_SECONDS = 0.02
"""How long a step without anything else to do waits for the process."""


class EncoderProcessError(RuntimeError):
    """No process can be had that encodes pictures."""


@dataclass(slots=True, eq=False)
class Sent:
    """A picture that the process has.

    Attributes:
        image: the picture.
        is_wanted: whether anybody still asks for it.
    """

    image: "MultiModalFeatureSpec"
    is_wanted: bool = True


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
        self._failed_starts, self._refused = 0, 0.0
        self._waiting: deque[MultiModalFeatureSpec] = deque()
        self._sent: deque[list[Sent]] = deque()
        self._suspects: set[str] = set()

    def start(self, start: Callable[[], EncoderProcess]) -> None:
        """Start a process, and wait until it can encode; :meth:`advance` may come after that.

        Args:
            start: starts one; called again for each that takes the place of another.

        Raises:
            EncoderProcessError: the process failed; no other is tried.
        """
        started = time.monotonic()
        self._start = start
        try:
            self._present = start()
            while not self._process.ready:
                self._process.wait(1.0)
                received = [*self._receive()]
                assert not received, "it was sent no pictures"
        except ProcessFault as fault:
            if self._present is not None:
                self._present.kill()
            raise EncoderProcessError(f"the vision encoder's process {fault}") from None
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
        for sent in chain(*self._sent):
            sent.is_wanted &= sent.image.identifier not in gone

    def submit(self, images: "Sequence[MultiModalFeatureSpec]") -> None:
        """Have pictures encoded, each of which :meth:`advance` returns once."""
        for image in images:
            # On its way already is a picture that was cancelled, unless it is another one to which
            # the user gave the same identifier.
            for sent in chain(*self._sent):
                if sent.image.identifier == image.identifier and sent.image.data == image.data:
                    sent.is_wanted = True
                    break
            else:
                self._waiting.append(image)

    def advance(self, *, idle: bool) -> list[EncodedImage]:
        """Pictures that became ready, or failed, since the last call.

        Also to be called while no picture is asked for: a process that has ended is then replaced
        before anybody waits for it.

        Args:
            idle: whether there is nothing else to do, so that it may wait a little.

        Raises:
            EncoderProcessError: processes fail again and again.
        """
        if self._present is None and time.monotonic() - self._refused > REFUSED_SECONDS:
            self._start_next()
        if idle and (self._sent or self._waiting):
            self._wait()
        if self._present is None:
            return []
        encoded = []
        try:
            for each in self._receive():
                encoded.append(each)
            self._send()
        except ProcessFault as fault:
            encoded += self._replace(fault)
        return encoded

    def close(self) -> None:
        """End the process, if one was started; what is under way is lost."""
        if self._present is not None:
            self._present.end()

    # -- the process --------------------------------------------------------------------------

    def _wait(self) -> None:
        if self._present is None:
            time.sleep(IDLE_SECONDS)
        else:
            self._present.wait(IDLE_SECONDS)

    def _receive(self) -> Iterator[EncodedImage]:
        for encoded in self._process.receive():
            if self._forget(encoded.identifier).is_wanted:
                yield encoded
        silent = time.monotonic() - self._process.last_heard
        if not self._process.ready and silent > START_SECONDS:
            raise ProcessFault(f"was not ready within {START_SECONDS:g} s")
        if self._process.ready and self._sent and silent > self._timeout:
            raise ProcessFault(
                f"did not encode a batch within {self._timeout:g} s (encode_timeout_seconds)"
            )

    def _send(self) -> None:
        """Keep the process busy.

        Raises:
            ProcessFault: the first batch of :attr:`_sent` could not be sent, and is to blame.
        """
        while self._process.ready and self._waiting and len(self._sent) < BATCHES_AHEAD:
            batch = self._next_batch()
            if not self._sent:
                self._process.last_heard = time.monotonic()
            sent = [Sent(image) for image in batch]
            try:
                self._process.send(batch)
            except ProcessFault:
                self._sent.appendleft(sent)
                raise
            self._sent.append(sent)

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
        failed = self._sent.popleft() if self._sent else []
        again = [sent.image for sent in chain(*self._sent) if sent.is_wanted]
        self._sent.clear()
        wanted = [sent.image for sent in failed if sent.is_wanted]
        if len(failed) > 1:  # one of them may be to blame for all, also one that nobody wants now
            self._suspects |= {image.identifier for image in wanted}
            again, wanted = wanted + again, []
        self._waiting.extendleft(reversed(again))
        self._go_on_after(fault)
        self._start_next()
        reason = f"could not be encoded: the vision encoder's process {fault}"
        return [EncodedImage(image.identifier, None, reason) for image in wanted]

    def _start_next(self) -> None:
        """Start another process, or note that the system refuses one."""
        assert self._start is not None, "start comes first"
        self._present = None
        try:
            self._present = self._start()
        except ProcessFault as fault:
            self._failed_starts, self._refused = self._failed_starts + 1, time.monotonic()
            self._go_on_after(fault)

    def _go_on_after(self, fault: ProcessFault) -> None:
        if self._failed_starts == MAX_STARTS:
            raise EncoderProcessError(
                f"the vision encoder's process failed {MAX_STARTS} times in a row before it was "
                f"ready; the last one {fault}"
            )
        logger.error("The vision encoder's process %s: another one is started", fault)

    def _forget(self, identifier: str) -> Sent:
        """Take a picture that is done out of the batch under way."""
        batch = self._sent[0]
        (sent,) = (each for each in batch if each.image.identifier == identifier)
        batch.remove(sent)
        self._suspects.discard(identifier)
        if not batch:
            self._sent.popleft()
        return sent

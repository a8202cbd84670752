# SPDX-License-Identifier: Apache-2.0
"""The encoder's process as the worker sees it: started, spoken to, and ended."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from vllm_spyre_mm.environment import encoder_environment
from vllm_spyre_mm.worker.encode_queue import EncodedImage
from vllm_spyre_mm.worker.encoder_process.channel import channel_pair
from vllm_spyre_mm.worker.encoder_process.messages import EncoderJob, Started

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

LEAVING_SECONDS = 5.0
"""For a process whose channel is closed to end; it takes milliseconds."""


class ProcessFault(RuntimeError):
    """The encoder's process failed; the message goes on after "the vision encoder's process"."""


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Make a fault of the process of what the system refuses: processes, descriptors, memory."""
    try:
        yield
    except OSError as error:
        raise ProcessFault(f"could not be had or spoken to: {error}") from error


class EncoderProcess:
    """A process that encodes pictures; it ends with this object's channel, and so with the worker.

    Args:
        job: what it does.
        num_threads: that it may take of the host.

    Attributes:
        ready: whether it has said that it can encode.
        last_heard: when it was started, last sent pictures while it had none, or said something; of
            ``time.monotonic``.

    Raises:
        ProcessFault: the system refuses a process, or what it is spoken to with.
    """

    def __init__(self, job: EncoderJob, num_threads: int) -> None:
        self.ready = False
        self.last_heard = time.monotonic()
        with _refusals(), contextlib.ExitStack() as undo:
            self._channel, theirs = channel_pair()
            undo.callback(self._channel.close)
            with contextlib.closing(theirs):
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", __package__, str(theirs.fileno())],
                    env=encoder_environment(num_threads),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            undo.callback(self.kill)
            self._send(job)
            undo.pop_all()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, pictures: "Sequence[MultiModalFeatureSpec]") -> None:
        """Hand a batch over; returns at once.

        Raises:
            ProcessFault: the system has no room for it.
        """
        self._send(list(pictures))

    def _send(self, message: object) -> None:
        with (
            _refusals(),
            contextlib.suppress(ConnectionError),  # it has ended, as receive() will say
        ):
            self._channel.send(message)

    def wait(self, seconds: float) -> None:
        """Wait for it to say something, or to end, for so long at most."""
        self._channel.poll(seconds)

    def receive(self) -> Iterator[EncodedImage]:
        """What it has encoded; does not wait.

        Raises:
            ProcessFault: it has ended, or cannot encode or be heard.
        """
        while self._channel.poll():
            try:
                with _refusals():
                    said = self._channel.receive()
            except EOFError:
                self._raise_end()
            self.last_heard = time.monotonic()
            if not isinstance(said, Started):
                yield said
            elif said.fault is not None:
                raise ProcessFault(f"could not load the encoder: {said.fault}")
            else:
                self.ready = True

    def _raise_end(self) -> NoReturn:
        """Say how it ended, whose channel is closed."""
        try:
            status = self._process.wait(LEAVING_SECONDS)
        except subprocess.TimeoutExpired:
            raise ProcessFault("closed its channel") from None
        if status >= 0:
            raise ProcessFault(f"ended with status {status}")
        reason = ", which the system sends when memory runs out, or somebody else"
        is_kill = -status == signal.SIGKILL
        raise ProcessFault(
            f"was ended by {signal.Signals(-status).name}{reason if is_kill else ''}"
        )

    def end(self) -> int:
        """End it, whatever it does; returns its exit status."""
        self._channel.close()
        try:
            return self._process.wait(LEAVING_SECONDS)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """End it at once; returns its exit status."""
        self._channel.close()
        self._process.kill()
        return self._process.wait()

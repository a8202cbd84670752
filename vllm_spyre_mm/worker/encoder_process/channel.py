# SPDX-License-Identifier: Apache-2.0
"""Messages between two processes over a pair of sockets; tensors travel in shared memory.

The memory has no name (``memfd_create``): the system frees it with the last process that maps it,
however that ends, and nothing of it is ever in ``/dev/shm``.
"""

import io
import os
import pickle
import select
import socket
import struct
from typing import Any

import torch

ALIGNMENT = 64
"""Bytes of a cache line, at a multiple of which each tensor begins."""

HEADER = struct.Struct("<Q")
"""Bytes of the pickled part of a message."""


class _Pickler(pickle.Pickler):
    """Leaves tensors out.

    Attributes:
        tensors: what was left out, with the places where they will lie, in bytes.
        end: behind the last of them.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[int, torch.Tensor]] = []
        self.end = 0

    def persistent_id(self, obj: Any) -> tuple[int, torch.Size, torch.dtype] | None:
        """Where a tensor will lie, with its shape and dtype."""
        if not isinstance(obj, torch.Tensor):
            return None
        start = -(-self.end // ALIGNMENT) * ALIGNMENT
        self.end = start + obj.nbytes
        self.tensors.append((start, obj))
        return start, obj.shape, obj.dtype


class _Unpickler(pickle.Unpickler):
    """Finds tensors in memory that another process has written."""

    def __init__(self, data: bytes, memory: torch.Tensor) -> None:
        super().__init__(io.BytesIO(data))
        self._memory = memory

    def persistent_load(self, pid: tuple[int, torch.Size, torch.dtype]) -> torch.Tensor:
        """A view of the memory, which lives as long as the tensor."""
        start, shape, dtype = pid
        part = self._memory[start : start + shape.numel() * dtype.itemsize]
        return part.view(dtype).view(shape)


class Channel:
    """One end of a pair of sockets; see :func:`channel_pair`.

    Args:
        end: of type ``SOCK_SEQPACKET``.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def fileno(self) -> int:
        """The socket's file descriptor."""
        return self._socket.fileno()

    def send(self, message: object) -> None:
        """Send a message; its tensors are copied.

        Returns at once as long as few messages are under way, whatever their size.

        Raises:
            ConnectionError: the other end is closed.
            OSError: the system has no memory or no file descriptor to spare.
        """
        pickled = io.BytesIO()
        pickler = _Pickler(pickled)
        pickler.dump(message)
        memory_fd = os.memfd_create("encoder", os.MFD_CLOEXEC)
        try:
            # Writing is faster than mapping memory that the system has to clear first.
            with open(memory_fd, "wb", closefd=False) as memory:
                for start, tensor in pickler.tensors:  # first, which the receiver wants aligned
                    memory.seek(start)
                    values = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
                    memory.write(values.data)
                memory.seek(pickler.end)
                memory.write(pickled.getbuffer())
            length = len(pickled.getbuffer())
            socket.send_fds(self._socket, [HEADER.pack(length)], [memory_fd])
        finally:
            os.close(memory_fd)

    def poll(self, seconds: float = 0.0) -> bool:
        """Whether there is a message, or the other end is closed; waits for it for so long."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def receive(self) -> Any:
        """Wait for the next message; its tensors may be written to.

        Raises:
            EOFError: the other end is closed, and all that it sent before was received.
            OSError: the system has no memory or no file descriptor to spare; the message is lost.
        """
        try:
            header, fds, _, _ = socket.recv_fds(self._socket, HEADER.size, 1)
        except ConnectionError:
            # The other end was closed with messages that it had not received. That is said once,
            # before what it had sent.
            header, fds, _, _ = socket.recv_fds(self._socket, HEADER.size, 1)
        if not header:
            raise EOFError
        if not fds:
            raise OSError("no file descriptor is left for a message")
        (memory_fd,) = fds
        try:
            memory = _mapped(memory_fd)
        finally:
            os.close(memory_fd)
        (length,) = HEADER.unpack(header)
        return _Unpickler(memory[len(memory) - length :].numpy().tobytes(), memory).load()

    def close(self) -> None:
        """Close this end; the other one finds that out."""
        self._socket.close()


def _mapped(memory_fd: int) -> torch.Tensor:
    """All of a file as bytes, uint8 ``(size,)``.

    Python's own maps keep a descriptor open for each.

    Raises:
        OSError: the system has no memory or no file descriptor to spare.
    """
    size = os.fstat(memory_fd).st_size
    name = f"/proc/self/fd/{memory_fd}"
    try:
        return torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise OSError(f"the memory of a message is not to be had: {error}") from error


def channel_pair() -> tuple[Channel, Channel]:
    """Two ends of a new channel."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(one), Channel(other)

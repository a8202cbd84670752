# SPDX-License-Identifier: Apache-2.0
"""A server behind the proxy, as the proxy knows it."""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import httpx

logger = logging.getLogger("encoder_proxy")


@dataclass(eq=False)
class Server:
    """A server.

    Attributes:
        address: without a path.
        rest_seconds: that it comes after all others when it has failed.
        down: set while its health check fails.
        rests_until: in seconds of the monotonic clock.
        requests: that it works on for this proxy.
        logged: statuses that the log has already.
    """

    address: str
    rest_seconds: float
    down: asyncio.Event = field(default_factory=asyncio.Event)
    rests_until: float = 0.0
    requests: int = 0
    logged: set[int] = field(default_factory=set)

    @property
    def rests(self) -> bool:
        """Whether it has failed a short time ago."""
        return time.monotonic() < self.rests_until

    @property
    def healthy(self) -> bool:
        """Whether it is neither down nor rests."""
        return not self.down.is_set() and not self.rests

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Count a request."""
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def failed(self, reason: object) -> None:
        """Let it come after all others for a while; its health check may be good all the same."""
        if not self.rests:
            logger.warning("%s failed: %s", self.address, reason)
        self.rests_until = time.monotonic() + self.rest_seconds

    def refused(self, answer: httpx.Response) -> None:
        """Log an answer that is none, once for each status."""
        if answer.status_code not in self.logged:
            self.logged.add(answer.status_code)
            words = "%s refuses, HTTP %d; that is said once: %s"
            logger.warning(words, self.address, answer.status_code, answer.text[:200])

    def checked(self, is_up: bool) -> None:
        """Keep what its health check says."""
        if is_up == self.down.is_set():
            logger.warning("%s is %s", self.address, "up" if is_up else "down")
        if is_up:
            self.down.clear()
        else:
            self.down.set()

    async def goes_down(self) -> None:
        """Wait until its health check fails."""
        await self.down.wait()


def ranked(servers: Sequence[Server], picture: str) -> list[Server]:
    """Servers that are not down, in a picture's own order (rendezvous hashing), resting ones last.

    A server that goes down or comes back changes the first place of its own pictures alone.
    """

    def weight(server: Server) -> bytes:
        return hashlib.sha256(f"{server.address} {picture}".encode()).digest()

    up = [server for server in servers if not server.down.is_set()]
    order = sorted(up, key=weight, reverse=True)
    return sorted(order, key=lambda server: server.rests)

# SPDX-License-Identifier: Apache-2.0
"""Asks the server, leaves at random moments, and compares what comes back."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tools.soak.traffic import SoakRequest
from vllm_spyre_mm.payload import decode_mm_embedding

LIMIT_SECONDS = 300.0
"""A request that takes longer hangs; alone it takes less than a few seconds."""


class RequestError(Exception):
    """The server answered with an error, which is clear: it has a sentence."""


@dataclass
class Choice:
    """One answer of a request.

    Attributes:
        text: all of it.
        finish_reason: None until it ends.
        embedding: as the server sends it.
    """

    text: str = ""
    finish_reason: str | None = None
    embedding: dict[str, Any] | None = None

    def equals(self, other: "Choice") -> bool:
        """Whether two answers to one request are the same."""
        if (self.text, self.finish_reason) != (other.text, other.finish_reason):
            return False
        if self.embedding is None or other.embedding is None:
            return self.embedding is other.embedding
        return _same_embedding(self.embedding, other.embedding)


Answer = dict[int, Choice]
"""By index of the choice."""


@dataclass(frozen=True)
class Leave:
    """When a client goes away.

    Attributes:
        after_seconds: from the moment it asked.
        after_events: of a stream; None for a client that does not count them.
    """

    after_seconds: float = LIMIT_SECONDS
    after_events: int | None = None


@dataclass
class Left(Exception):
    """The client went away before the end."""


@dataclass
class Client:
    """Asks one server.

    Attributes:
        session: of aiohttp; as many connections as requests.
    """

    session: aiohttp.ClientSession = field(repr=False)

    async def ask(
        self, request: SoakRequest, *, stream: bool = False, leave: Leave | None = None
    ) -> Answer:
        """Send a request and read its answer.

        Args:
            request: what is asked.
            stream: as server-sent events.
            leave: go away, by closing the connection.

        Raises:
            RequestError: the server said what is wrong.
            Left: as ``leave`` says.
            TimeoutError: no end came in :data:`LIMIT_SECONDS`.
        """
        limit = LIMIT_SECONDS if leave is None else min(leave.after_seconds, LIMIT_SECONDS)
        try:
            async with asyncio.timeout(limit):
                return await self._read(request, stream, leave and leave.after_events)
        except TimeoutError:
            if leave is not None and leave.after_seconds < LIMIT_SECONDS:
                raise Left from None
            raise

    async def _read(self, request: SoakRequest, stream: bool, events: int | None) -> Answer:
        data, headers = request.encoded(stream), {"Content-Type": "application/json"}
        async with self.session.post(request.path, data=data, headers=headers) as response:
            if response.status != 200:
                raise RequestError(f"{response.status}: {_sentence(await response.json())}")
            answer: Answer = {}
            if not stream:
                _add(answer, await response.json())
                return answer
            received = 0
            async for event in _events(response):
                if "error" in event:
                    raise RequestError(_sentence(event))
                _add(answer, event)
                received += 1
                if received == events:
                    raise Left
            return answer


def _sentence(body: dict[str, Any]) -> str:
    return str(body["error"]["message"])


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream up to its end.

    Raises:
        RequestError: the connection closed before the end.
    """
    buffer = b""
    async for piece in response.content.iter_any():
        buffer += piece
        *whole, buffer = buffer.split(b"\n\n")
        for event in whole:
            content = event.removeprefix(b"data: ")
            if content == b"[DONE]":
                return
            yield json.loads(content)
    raise RequestError("the stream was cut off")


def _add(answer: Answer, body: dict[str, Any]) -> None:
    """Take what a response, or an event of a stream, says of its choices."""
    if "choices" not in body:  # /v1/mm_embeddings
        answer[0] = Choice(embedding=body["mm_embedding"])
    for said in body.get("choices", ()):
        choice = answer.setdefault(said["index"], Choice())
        message = said.get("message") or said.get("delta") or {}
        choice.text += said.get("text") or message.get("content") or ""
        choice.finish_reason = said.get("finish_reason") or choice.finish_reason
        choice.embedding = said.get("mm_embedding") or choice.embedding


def same_answer(found: Answer, expected: Answer) -> bool:
    """Whether an answer is the one that the request got alone."""
    return found.keys() == expected.keys() and all(
        found[index].equals(expected[index]) for index in expected
    )


def _same_embedding(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Equal but for rounding: images that are encoded together are summed in another order."""
    if (found["shape"], found["dtype"]) != (expected["shape"], expected["dtype"]):
        return False
    one, other = decode_mm_embedding(found), decode_mm_embedding(expected)
    tolerance = (0.02 if found["dtype"] == "int8" else 1e-4) * float(other.abs().max())
    return float((one - other).abs().max()) <= tolerance

# SPDX-License-Identifier: Apache-2.0
"""Sends hostile requests to a server, many at a time, and judges what comes back."""

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httpx

from tests.e2e.engines import relative_error
from tests.hostile.case import EMBEDDINGS, Case, chat_prompt
from tests.reference import Reference
from vllm_spyre_mm.payload import decode_mm_embedding

AT_ONCE = 24
PATIENCE_SECONDS = 120
"""After which a request counts as hung; the slowest takes a few seconds."""


@dataclass(frozen=True)
class Answer:
    """What came back for a case; a status of None is no answer: hung up on, or nothing in time."""

    case: Case
    status: int | None
    content: bytes


def send(address: str, cases: Iterable[Case]) -> list[Answer]:
    """Post every case and return what came back, in order."""
    return asyncio.run(_send(address, list(cases)))


async def _send(address: str, cases: list[Case]) -> list[Answer]:
    turns = asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE)

    async def post(client: httpx.AsyncClient, case: Case) -> Answer:
        given = {"Content-Type": "application/json"} | case.headers
        headers = {name: value.encode("latin-1") for name, value in given.items()}
        async with turns:
            try:
                response = await client.post(case.path, content=case.content, headers=headers)
            except httpx.TransportError as error:
                return Answer(case, None, repr(error).encode())
        return Answer(case, response.status_code, response.content)

    async with httpx.AsyncClient(
        base_url=address, timeout=PATIENCE_SECONDS, limits=limits
    ) as client:
        return await asyncio.gather(*(post(client, case) for case in cases))


class Judge:
    """Says what is wrong with an answer.

    Args:
        reference: Transformers on the server's checkpoint, in fp32.
        bound: of the features' error, relative to the largest.
        lead: tokens are to be those of the reference as far as each leads by more, in logits.
    """

    def __init__(self, reference: Reference, bound: float = 1e-4, lead: float = 0.0) -> None:
        self.reference, self.bound, self.lead = reference, bound, lead

    def fault(self, answer: Answer) -> str | None:
        """What is wrong with an answer; None where it is what it may be."""
        case, status = answer.case, answer.status
        if status is None:
            return f"no answer: {answer.content.decode()}"
        said = answer.content[:300].decode(errors="replace")
        if not (status == 200 or 400 <= status < 500):
            return f"HTTP {status}: {said}"
        if status == 200 and case.verdict == "refused":
            return f"answered, and is to be refused: {said}"
        if status != 200:
            if case.verdict == "answered":
                return f"refused with HTTP {status}, and is to be answered: {said}"
            return None if _explained(answer.content) else f"HTTP {status} says nothing: {said}"
        if answer.content.startswith(b"data: "):
            return _fault_of_stream(answer.content)
        return self._wrong(case, answer.content)

    def _wrong(self, case: Case, content: bytes) -> str | None:
        body = json.loads(content)
        if case.pictures is not None:
            holder = body if case.path == EMBEDDINGS else body["choices"][0]
            prompt = chat_prompt("", len(case.pictures))
            expected = self.reference.features(prompt, list(case.pictures))
            found = decode_mm_embedding(holder["mm_embedding"])
            if found.shape != expected.shape:
                return f"features of {tuple(found.shape)}, not {tuple(expected.shape)}"
            error = relative_error(found, expected)
            if not error < self.bound:
                return f"features off by {error:.2g}"
        if case.prompt is not None:
            found_text = _text(body)
            asked = (case.prompt, list(case.pictures or ()), 4)
            if self.lead:
                tokens = self.reference.certain_tokens(*asked, self.lead)
            else:
                tokens = self.reference.generate(*asked)
            text = self.reference.processor.decode(tokens, skip_special_tokens=True)
            text = text.rstrip("\ufffd")  # vLLM keeps back what ends in the middle of a character
            right = found_text.startswith(text) if self.lead else found_text == text
            if not right:
                return f"says {found_text!r}, not {text!r}"
        return None


def _fault_of_stream(content: bytes) -> str | None:
    """What is wrong with server-sent events: an error after HTTP 200 is none of the client's."""
    if not content.rstrip().endswith(b"data: [DONE]"):
        return f"a stream without an end: {content[-300:]!r}"
    return f"an error in a stream: {content[-300:]!r}" if b'"error"' in content else None


def _text(body: Any) -> str:
    choice = body["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def _explained(content: bytes) -> bool:
    """Whether a refusal has a sentence."""
    try:
        body = json.loads(content)
    except ValueError:
        return False
    error = body.get("error", body) if isinstance(body, dict) else {}
    said = error.get("message") or error.get("detail")
    return bool(said)

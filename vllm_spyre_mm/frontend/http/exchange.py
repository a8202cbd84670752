# SPDX-License-Identifier: Apache-2.0
"""What an HTTP request asks for and what its response gets, while the engine serves it.

The middleware knows the request's body and writes its response; the engine's requests are made and
answered in between, by handlers of vLLM's. A context variable joins the two.
"""

import copy
import re
import secrets
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.multimodal.embedding_choice import EXTRA_ARG, EmbeddingChoice
from vllm_spyre_mm.payload import mm_embedding_text

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput
    from vllm.sampling_params import SamplingParams

_PLACEHOLDER = re.compile(rb'"mm_embedding:([0-9a-f]{32})"')


class PendingEmbeddings:
    """The embeddings of one response that are still to be written into it."""

    def __init__(self) -> None:
        self._texts: dict[bytes, Iterator[bytes]] = {}

    def __bool__(self) -> bool:
        return bool(self._texts)

    def add(self, text: Iterator[bytes]) -> str:
        """Keep an embedding for later.

        Args:
            text: pieces of its JSON.

        Returns:
            The value that stands for it in the response.
        """
        name = secrets.token_hex(16)
        self._texts[name.encode()] = text
        return f"mm_embedding:{name}"

    def fill(self, body: bytes) -> Iterator[bytes]:
        """Pieces of ``body`` with the embeddings in place of what stands for them."""
        end = 0
        for match in _PLACEHOLDER.finditer(body):
            text = self._texts.pop(match[1], None)
            if text is not None:
                yield body[end : match.start()]
                yield from text
                end = match.end()
        yield body[end:]


class Exchange:
    """One HTTP request and its response.

    Args:
        choice: what is wanted of embeddings; None for nothing.
        conversations: that share the response.

    Attributes:
        choice: as given; a route whose body says it in another way sets it.
        pending: the embeddings that the response lacks.
    """

    def __init__(self, choice: EmbeddingChoice | None = None, conversations: int = 1) -> None:
        self.choice = choice
        self.pending = PendingEmbeddings()
        self._conversations = conversations
        self._num_choices = 0
        self._values: dict[int, str] = {}

    def begin(
        self, params: "SamplingParams", settings: SpyreSettings
    ) -> "tuple[SamplingParams, int]":
        """A request of the engine's is made for this one, in the order of prompts or conversations.

        Args:
            params: its parameters.
            settings: of the engine; they have the largest response, of which each answer has an
                equal part.

        Returns:
            Its parameters with the choice, and the index of its first answer in the response.
        """
        first = self._num_choices
        self._num_choices += params.n
        if self.choice is None and not settings.enable_return_mm_embedding:
            return params, first
        given: Any = False
        if self.choice is not None:
            share = settings.max_mm_embedding_response_bytes // (params.n * self._conversations)
            limit = max(share, 1)
            given = self.choice.model_dump(mode="json")
            given["max_bytes"] = min(self.choice.max_bytes or limit, limit)
        params = copy.copy(params)
        params.extra_args = {**(params.extra_args or {}), EXTRA_ARG: given}
        return params, first

    def note(self, outputs: "Iterable[CompletionOutput]", first: int) -> None:
        """Keep the embeddings of the outputs that finish.

        Args:
            outputs: of one request of the engine's.
            first: index of its first answer.
        """
        if self.choice is None:
            return
        for output in outputs:
            embedding = getattr(output, "mm_embedding", None)
            if embedding is not None and output.finish_reason is not None:
                info = output.mm_embedding_info  # type: ignore[attr-defined]
                text = mm_embedding_text(embedding, info, self.choice.encoding_format)
                self._values[first + output.index] = self.pending.add(text)

    def value(self, index: int) -> str | None:
        """What stands for the embedding of an answer in the response; None if it has none.

        Args:
            index: of the answer.
        """
        return self._values.get(index)


EXCHANGE: ContextVar[Exchange | None] = ContextVar("exchange", default=None)
"""Of the request that is served in this context; None outside of a server of HTTP."""

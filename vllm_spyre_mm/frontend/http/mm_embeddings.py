# SPDX-License-Identifier: Apache-2.0
"""``POST /v1/mm_embeddings``: embeddings of images and videos, without a question or an answer.

The decoder's part of a chat is left out: the items are a chat's, and its answer is not shown.
"""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from vllm_spyre_mm.frontend.http.exchange import EXCHANGE
from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice, parse_choice

router = APIRouter()


class MMEmbeddingsRequest(BaseModel):
    """Images and videos, and what is wanted of their embeddings.

    Attributes:
        model: the served name; the server's own when it is left out.
        input: content parts of the kinds that a chat message has for images and videos.
        return_mm_embedding: as in a chat request; ``generate`` is false whatever it says.
        encoding_format: ``base64`` or ``float``.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    input: list[dict[str, Any]] = Field(min_length=1)
    return_mm_embedding: Any = True
    encoding_format: str = "base64"


@router.post("/v1/mm_embeddings")
@with_cancellation  # a client that goes away takes its request with it
async def create_mm_embeddings(body: MMEmbeddingsRequest, raw_request: Request) -> JSONResponse:
    """Encode images and videos; the decoder does not run.

    Raises:
        VLLMValidationError: an input is neither, or the choice is not what it may be (HTTP 400).
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.exceptions import VLLMValidationError

    others = sorted(
        {
            str(part.get("type"))
            for part in body.input
            if not any(modality in str(part.get("type")) for modality in ("image", "video"))
        }
    )
    if others:
        raise VLLMValidationError(
            f"input takes images and videos alone, not {', '.join(others)}: ask "
            "/v1/chat/completions",
            parameter="input",
        )
    exchange = EXCHANGE.get()
    assert exchange is not None, "the middleware comes with this route"
    exchange.choice = _choice_of(body)
    request = ChatCompletionRequest.model_validate(
        {
            "model": body.model,
            "messages": [{"role": "user", "content": body.input}],
            "max_tokens": 1,
            "temperature": 0,
        }
    )
    response = await raw_request.app.state.openai_serving_chat.create_chat_completion(
        request, raw_request
    )
    if isinstance(response, ErrorResponse):
        return JSONResponse(response.model_dump(), status_code=response.error.code)
    return JSONResponse(
        {
            "id": response.id.replace("chatcmpl-", "mmemb-"),
            "object": "mm_embedding",
            "created": response.created,
            "model": response.model,
            "mm_embedding": exchange.value(0),
            "usage": {"prompt_tokens": response.usage.prompt_tokens},
        }
    )


def _choice_of(body: MMEmbeddingsRequest) -> EmbeddingChoice:
    from vllm.exceptions import VLLMValidationError

    choice = parse_choice(body.return_mm_embedding)
    if choice is None:
        raise VLLMValidationError(
            "return_mm_embedding is false, and embeddings are all that there is here",
            parameter="return_mm_embedding",
        )
    given = choice.model_dump(mode="json")
    alone = parse_choice(given | {"generate": False, "encoding_format": body.encoding_format})
    assert alone is not None
    return alone

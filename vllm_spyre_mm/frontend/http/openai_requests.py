# SPDX-License-Identifier: Apache-2.0
"""The field ``return_mm_embedding`` of the requests of OpenAI's API."""

from typing import Any

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.multimodal.embedding import EXTRA_ARG, EmbeddingChoice, parse_choice


def ask_of(request: Any) -> EmbeddingChoice | None:
    """The choice of a request that has the field, and wants an embedding; None of another.

    Raises:
        VLLMValidationError: the field is not what it may be, or the request a beam search (HTTP
            400).
    """
    from vllm.exceptions import VLLMValidationError

    value = _field_of(request)
    choice = None if value is None else parse_choice(value)
    if choice is None:
        return None
    if request.use_beam_search:
        raise VLLMValidationError(
            "return_mm_embedding is not returned with use_beam_search, whose sequences vLLM makes "
            "of many requests: ask without it, with max_tokens=1 for instance",
            parameter=EXTRA_ARG,
        )
    top = (request.model_extra or {}).get("encoding_format")
    if top is not None:
        choice = parse_choice(choice.model_dump(mode="json") | {"encoding_format": top})
    return choice


def _field_of(request: Any) -> Any:
    extra = request.model_extra or {}
    return extra.get(EXTRA_ARG, (getattr(request, "vllm_xargs", None) or {}).get(EXTRA_ARG))


def read_field(request: Any, settings: SpyreSettings, answers: int = 1) -> None:
    """Move the field of a request to where its sampling parameters come from, in place.

    Without the field nothing is to be returned, so that nothing is copied either.

    Args:
        request: of OpenAI's API.
        settings: of the engine; they have the largest response.
        answers: requests that share a response. Each of their ``n`` answers carries its own copy.

    Raises:
        VLLMValidationError: as :func:`ask_of`.
    """
    choice = ask_of(request)
    asked = _field_of(request) is not None
    for name in (EXTRA_ARG, "encoding_format") if choice is not None else (EXTRA_ARG,):
        (request.model_extra or {}).pop(name, None)
    if not asked and not settings.enable_return_mm_embedding:
        return
    given: Any = False
    if choice is not None:
        answers *= max(request.n or 1, 1)
        limit = max(settings.max_mm_embedding_response_bytes // answers, 1)
        given = choice.model_dump(mode="json")
        given["max_bytes"] = min(choice.max_bytes or limit, limit)
    request.vllm_xargs = dict(request.vllm_xargs or {}) | {EXTRA_ARG: given}

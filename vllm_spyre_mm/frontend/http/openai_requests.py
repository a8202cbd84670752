# SPDX-License-Identifier: Apache-2.0
"""The field ``return_mm_embedding`` in the JSON of requests."""

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vllm_spyre_mm.frontend.http.exchange import Exchange
from vllm_spyre_mm.multimodal.embedding_choice import EXTRA_ARG, parse_choice


def parse_if_asking(body: bytes) -> dict[str, Any] | None:
    """A request that has the field somewhere; None of another, which is not parsed.

    Args:
        body: what came, JSON or not. What is no JSON is left to its route.
    """
    if EXTRA_ARG.encode() not in body:
        return None
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return request if isinstance(request, dict) else None


def asks_anywhere(request: dict[str, Any] | None) -> bool:
    """Whether a request says that it wants an embedding, where any of vLLM's routes has fields."""
    parameters = _field(request, "sampling_params")
    places = (request, _field(request, "vllm_xargs"), _field(parameters, "extra_args"))
    return any(_field(place, EXTRA_ARG) not in (None, False) for place in places)


def exchange_for(request: dict[str, Any] | None) -> Exchange:
    """What a request of OpenAI's API asks for, in a field of its own or in ``vllm_xargs``.

    Raises:
        VLLMValidationError: the field is not what it may be, or the request a beam search (HTTP
            400).
    """
    from vllm.exceptions import VLLMValidationError

    if request is None:
        return Exchange()
    value = request.get(EXTRA_ARG, _field(request.get("vllm_xargs"), EXTRA_ARG))
    choice = None if value is None else parse_choice(value)
    if choice is None:
        return Exchange()
    if _is_true(request.get("use_beam_search")):
        raise VLLMValidationError(
            "return_mm_embedding is not returned with use_beam_search, whose sequences vLLM makes "
            "of many requests: ask without it, with max_tokens=1 for instance",
            parameter=EXTRA_ARG,
        )
    encoding_format = request.get("encoding_format")
    if encoding_format is not None:
        choice = parse_choice(choice.model_dump(mode="json") | {"encoding_format": encoding_format})
    return Exchange(choice, max(_num_conversations(request.get("messages")), 1))


def _num_conversations(messages: Any) -> int:
    """Those of a batch: lists of messages in place of messages."""
    return sum(isinstance(each, list) for each in messages) if isinstance(messages, list) else 0


def _is_true(value: Any) -> bool:
    """As vLLM reads a field that is true or false; it refuses what is neither."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None

# SPDX-License-Identifier: Apache-2.0
"""The field ``mm_embedding`` in the JSON of responses, on the choice that finishes."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FIELD = "mm_embedding"

Value = Callable[[int], str | None]
"""What stands for the embedding of a choice, by its index; None for a request without images."""


def add_to_response(body: bytes, value: Value) -> bytes:
    """A whole response with the embeddings on its choices; an error has none and stays as it is.

    Args:
        body: JSON.
        value: of each choice.
    """
    response = json.loads(body)
    choices = response.get("choices") if isinstance(response, dict) else None
    if not choices:
        return body
    for choice in choices:
        choice[FIELD] = value(choice["index"])
    return _dump(response)


def add_to_events(body: bytes, value: Value) -> bytes:
    """Server-sent events with the embeddings on the choices that finish in them.

    Args:
        body: whole events.
        value: of each choice.
    """
    return b"\n\n".join(_add_to_event(event, value) for event in body.split(b"\n\n"))


def _add_to_event(event: bytes, value: Value) -> bytes:
    prefix = b"data: "
    if not event.startswith(prefix + b"{"):
        return event
    response = json.loads(event.removeprefix(prefix))
    finished = [
        choice for choice in response.get("choices", ()) if choice.get("finish_reason") is not None
    ]
    for choice in finished:
        choice[FIELD] = value(choice["index"])
    return prefix + _dump(response) if finished else event


def add_to_models(body: bytes, vllm_config: "VllmConfig") -> bytes:
    """The list of models that says what embeddings they return; as it is if they return none."""
    settings = SpyreSettings.from_vllm_config(vllm_config)
    models = json.loads(body)
    if not settings.enable_return_mm_embedding or "data" not in models:
        return body
    mapping = get_mm_mapping(vllm_config.model_config.hf_config)
    hidden_size: int = mapping.text_config.hidden_size
    for card in models["data"]:
        card[FIELD] = {
            "hidden_size": hidden_size,
            "levels": mapping.feature_width // hidden_size - 1,
            "modalities": list(mapping.modalities),
            "dtype": settings.encoder_dtype,
            "max_bytes": settings.max_mm_embedding_response_bytes,
        }
    return _dump(models)


def _dump(content: Any) -> bytes:
    """JSON as the server writes it."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()

# SPDX-License-Identifier: Apache-2.0
"""Keeps media of one client from being taken for those of another, and faulty parts from vLLM.

:func:`check_message` and :func:`without_uuids` see every chat that comes over HTTP
(``frontend.renderer``).
"""

from collections.abc import Mapping
from typing import Any

from vllm_spyre_mm.vllm_fixes.fault import Fault

FAULT = Fault(
    "A uuid beside an image or a video is vLLM's key of it in every cache, as it stands: two "
    "clients that choose the same one, by chance or not, share the features of one. vLLM fails at "
    "an embedding whose fields are neither text nor a list, with HTTP 500.",
    seen_in="0.32.0",
)
REPLACED = ()

EMBEDDINGS = ("image_embeds", "video_embeds")
MEDIA = ("image_url", "image_pil", "video_url", *EMBEDDINGS)
"""Fields of a content part that hold an image or a video."""


def check_message(message: Any) -> None:
    """Refuse an embedding of several tensors where one is neither base64 nor a list.

    Args:
        message: of a chat; its content can be read more than once.

    Raises:
        VLLMValidationError: says which field (HTTP 400).
    """
    from vllm.exceptions import VLLMValidationError

    content = message.get("content") if isinstance(message, Mapping) else None
    for part in content if isinstance(content, list) else ():
        for kind in EMBEDDINGS if isinstance(part, Mapping) else ():
            embedding = part.get(kind)
            for name, value in embedding.items() if isinstance(embedding, Mapping) else ():
                if not isinstance(value, (str, list)):
                    raise VLLMValidationError(
                        f"the field {name!r} of an embedding must be base64 text or a list of "
                        f"numbers, not {type(value).__name__}",
                        parameter=kind,
                    )


def without_uuids(message: Any) -> Any:
    """A chat message whose images and videos are told apart by their content.

    Raises:
        VLLMValidationError: one is named and not sent (HTTP 400).
    """
    content = message.get("content") if isinstance(message, Mapping) else None
    if content is None or isinstance(content, (str, Mapping)):
        return message
    return {**message, "content": [_without_uuid(part) for part in content]}


def _without_uuid(part: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    if not isinstance(part, Mapping) or part.get("uuid") is None:
        return part
    if all(part.get(name) is None for name in MEDIA):
        raise VLLMValidationError(
            "an image or a video is named by its uuid alone, and this server knows them by their "
            "content: send it, or start the server with trust_client_image_uuids",
            parameter="uuid",
        )
    return {name: value for name, value in part.items() if name != "uuid"}

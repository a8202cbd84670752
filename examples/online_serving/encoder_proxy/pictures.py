# SPDX-License-Identifier: Apache-2.0
"""What encoders are asked for the pictures of a chat."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

DECIDES_FEATURES = ("model", "mm_processor_kwargs", "media_io_kwargs")
"""Fields of a chat that decide how a picture is encoded."""


def encode_requests(body: bytes) -> dict[str, bytes]:
    """The request that has a picture encoded, for each picture of a chat, by the picture's hash.

    Args:
        body: of the chat. Of one that cannot be read there are none: the decoder says what is
            wrong with it.
    """
    try:
        chat = json.loads(body)
        if not isinstance(chat, dict):
            return {}
        decides = {name: chat[name] for name in DECIDES_FEATURES if name in chat}
        return {_hash(part): _request(part, decides) for part in _pictures(chat)}
    except (ValueError, RecursionError):
        return {}


def _pictures(chat: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Parts with a picture; vLLM does not ask for their type."""
    for message in _dicts(chat.get("messages")):
        for part in _dicts(message.get("content")):
            if "image_url" in part:
                yield part


def _hash(part: dict[str, Any]) -> str:
    """Stands for a picture's features, which vLLM names by the client's uuid if there is one."""
    image, uuid = part["image_url"], part.get("uuid")
    url = image.get("url") if isinstance(image, dict) else image
    name = ["url", url] if uuid is None else ["uuid", uuid]
    return hashlib.sha256(json.dumps(name).encode()).hexdigest()


def _request(part: dict[str, Any], decides: dict[str, Any]) -> bytes:
    messages = [{"role": "user", "content": [part]}]
    return json.dumps({**decides, "messages": messages, "max_tokens": 1}).encode()


def _dicts(value: Any) -> list[dict[str, Any]]:
    """What of a list are objects: a client may have sent anything."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []

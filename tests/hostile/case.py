# SPDX-License-Identifier: Apache-2.0
"""A hostile request, and what it may be answered with."""

import base64
import io
import json
import random
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from vllm_spyre_mm.demo import pictures

Verdict = Literal["refused", "answered", "either"]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/mm_embeddings"

QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class Case:
    """A request over HTTP.

    Attributes:
        name: of its own among all cases.
        path: of the endpoint.
        body: what is posted: bytes as they are, anything else as JSON.
        verdict: ``refused``: an HTTP status of 4xx. ``answered``: 200. ``either`` of the two.
        pictures: what the request shows, as this test reads it; features in a response of 200 have
            to be those of Transformers for them. None where no features are compared.
        prompt: what the decoder is to be given, with a tag for each picture; the greedy text in a
            response of 200 has to be that of Transformers. None where no text is compared.
        headers: besides those that say that the body is JSON.
    """

    name: str
    path: str
    body: Any
    verdict: Verdict = "either"
    pictures: tuple[Image.Image, ...] | None = None
    prompt: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def content(self) -> bytes:
        """The body as it goes over the wire."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def drawn(seed: str, size: tuple[int, int] = (48, 36)) -> Image.Image:
    """A picture of its own for each seed."""
    rng = random.Random(f"hostile-{seed}")
    return pictures.draw_picture(pictures.random_shapes(rng, 2), size, rng=rng).image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def image_part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def part_of(image: Image.Image) -> dict[str, Any]:
    """A content part that shows a picture."""
    return image_part(data_url(encoded(image)))


def good_part(seed: str) -> dict[str, Any]:
    """A content part that nothing is wrong with."""
    return part_of(drawn(seed))


def chat(content: Any, **more: Any) -> dict[str, Any]:
    """A chat request of one message; ``more`` are its other fields."""
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 4,
        **more,
    }


def chat_prompt(text: str, num_images: int = 0) -> str:
    """What the demo checkpoint's chat template makes of such a message."""
    tags = "<image>\n" * num_images
    return f"<|user|>\n{tags}{text}\n<|assistant|>\n"


def completion(prompt: Any, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 4, **more}

# SPDX-License-Identifier: Apache-2.0
"""Requests for embeddings over HTTP, and what metrics say of them."""

import io
import json
import random
import time
import urllib.error
import urllib.request
from base64 import b64encode
from typing import Any

import openai
import torch
from PIL import Image

from tests.e2e.serving import data_url, metrics, png
from tests.reference import Reference
from vllm_spyre_mm.demo import pictures
from vllm_spyre_mm.payload import decode_mm_embedding

QUESTION = "What is in the picture?"
MAX_QUEUED = 8
"""Requests that the server takes at a time."""


def drawn(seed: int, size: tuple[int, int] = (192, 144)) -> Image.Image:
    rng = random.Random(f"server-embeddings-{seed}")
    return pictures.draw_picture(pictures.random_shapes(rng, 2), size, rng=rng).image


def messages(*images: Image.Image, question: str = QUESTION) -> list[Any]:
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": data_url(png(image))}} for image in images
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def ask(client: openai.OpenAI, *images: Image.Image, **more: Any) -> Any:
    extra = more.pop("extra_body", {"return_mm_embedding": True})
    return client.chat.completions.create(
        model="demo",
        messages=messages(*images),
        max_tokens=16,
        extra_body=extra,
        **{"temperature": 0, **more},
    )


def expected_features(reference: Reference, *images: Image.Image) -> torch.Tensor:
    tags = "<image>\n" * len(images)
    return reference.features(f"<|user|>\n{tags}{QUESTION}\n<|assistant|>\n", list(images))


def embeds_part(payload: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(decode_mm_embedding(payload), buffer)
    return {"type": "image_embeds", "image_embeds": b64encode(buffer.getvalue()).decode()}


def held_bytes(server: str, *, wanted: bool) -> float:
    """The gauge, once it is zero or is not: a step's statistics come after its output."""
    deadline = time.monotonic() + 60
    while bool(held := metrics(server)["mm_embedding_held_bytes"]) != wanted:
        assert time.monotonic() < deadline, f"{held} bytes are held"
    return held


def post_raw(url: str, body: Any) -> bytes:
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return bytes(response.read())


def post(server: str, body: Any, path: str = "/v1/mm_embeddings") -> tuple[int, Any]:
    try:
        return 200, json.loads(post_raw(server + path, body))
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def parts_of(*images: Image.Image) -> list[Any]:
    return [{"type": "image_url", "image_url": {"url": data_url(png(image))}} for image in images]

# SPDX-License-Identifier: Apache-2.0
"""What is asked: a pool of distinct requests of all kinds, each with one right answer."""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tests.e2e.serving import data_url, png
from vllm_spyre_mm.demo import pictures

MAX_MODEL_LEN = 1024
NUM_PICTURES = 24
"""Together they have some 3,500 features, and the encoder cache has room for 1,024."""

EMBEDDINGS: tuple[Any, ...] = (False, True, {"pooling": "image"}, {"dtype": "int8"})
COLOURS = {"type": "object", "properties": {"colour": {"enum": ["red", "green", "blue"]}}}
STRUCTURES: tuple[dict[str, Any], ...] = (
    {"structured_outputs": {"choice": ["a red circle", "a blue square", "nothing"]}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "seen", "schema": COLOURS | {"required": ["colour"]}},
        }
    },
)


@dataclass(frozen=True)
class SoakRequest:
    """A request that can be sent any number of times.

    Attributes:
        kind: for the report.
        path: of the endpoint.
        body: as JSON, without ``stream``.
        streams: it may be streamed.
    """

    kind: str
    path: str
    body: dict[str, Any]
    streams: bool = True

    def encoded(self, stream: bool) -> bytes:
        """The body as it is sent."""
        return json.dumps(self.body | ({"stream": True} if stream else {})).encode()


def request_pool(size: int, seed: int) -> list[SoakRequest]:
    """Requests of every kind in turn; the same seed gives the same pool."""
    rng = random.Random(f"soak-{seed}")
    drawn = [_picture(rng) for _ in range(NUM_PICTURES)]
    kinds = itertools.cycle(
        (_greedy, _sampled, _structured, _text, _greedy, _embedding_alone, _tiny, _maximal)
    )
    return [kind(rng, drawn) for kind in itertools.islice(kinds, size)]


def _picture(rng: random.Random) -> pictures.Picture:
    shapes = pictures.random_shapes(rng, rng.choice((1, 2)))
    return pictures.draw_picture(shapes, (rng.randint(40, 96), rng.randint(40, 96)), rng=rng)


def _chat(question: str, shown: list[Image.Image], **body: Any) -> dict[str, Any]:
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": data_url(png(image))}} for image in shown
    ]
    parts.append({"type": "text", "text": question})
    return {"model": "demo", "messages": [{"role": "user", "content": parts}]} | body


def _about_pictures(
    rng: random.Random, drawn: list[pictures.Picture], kind: str, **body: Any
) -> SoakRequest:
    """One to four pictures; one may be shown twice."""
    shown = rng.choices(drawn, k=rng.randint(1, 4))
    question = pictures.random_questions(rng, shown)[0].text
    chat = _chat(question, [each.image for each in shown], **body)
    if embedding := rng.choice(EMBEDDINGS):
        chat["return_mm_embedding"] = embedding
    return SoakRequest(kind, "/v1/chat/completions", chat)


def _greedy(rng: random.Random, drawn: list[pictures.Picture]) -> SoakRequest:
    tokens = rng.choice((8, 24, 48))
    return _about_pictures(rng, drawn, "greedy", temperature=0, max_tokens=tokens)


def _sampled(rng: random.Random, drawn: list[pictures.Picture]) -> SoakRequest:
    sampling = {"temperature": 0.8, "seed": rng.randrange(1000), "n": rng.randint(1, 3)}
    return _about_pictures(rng, drawn, "sampled", max_tokens=16, **sampling)


def _structured(rng: random.Random, drawn: list[pictures.Picture]) -> SoakRequest:
    structure = rng.choice(STRUCTURES)
    return _about_pictures(rng, drawn, "structured", temperature=0, max_tokens=24, **structure)


def _text(rng: random.Random, drawn: list[pictures.Picture]) -> SoakRequest:
    question = rng.choice(pictures.questions_without_picture()).text
    return SoakRequest(
        "text", "/v1/chat/completions", _chat(question, [], temperature=0, max_tokens=24)
    )


def _embedding_alone(rng: random.Random, drawn: list[pictures.Picture]) -> SoakRequest:
    shown = [each.image for each in rng.choices(drawn, k=rng.randint(1, 4))]
    (message,) = _chat("", shown)["messages"]
    body = {"input": message["content"][:-1]}
    return SoakRequest("embedding alone", "/v1/mm_embeddings", body, streams=False)


def _completion(kind: str, token_ids: list[int], max_tokens: int) -> SoakRequest:
    body = {
        "model": "demo",
        "prompt": token_ids,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    return SoakRequest(kind, "/v1/completions", body)


def _tiny(rng: random.Random, drawn: list[pictures.Picture]) -> SoakRequest:
    return _completion("tiny", [rng.randrange(10, 500)], 1)


def _maximal(rng: random.Random, drawn: list[pictures.Picture]) -> SoakRequest:
    """As long as a request may be, by its prompt or by its answer."""
    max_tokens = rng.choice((4, 64, 300))
    length = MAX_MODEL_LEN - max_tokens
    return _completion("maximal", [rng.randrange(10, 500) for _ in range(length)], max_tokens)


def stream_of(pool: list[SoakRequest], rng: random.Random) -> Iterator[SoakRequest]:
    """Requests of the pool at random, for ever."""
    while True:
        yield rng.choice(pool)

# SPDX-License-Identifier: Apache-2.0
"""Hostile prompts for ``LLM.generate``."""

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.hostile import embeds, files, placeholders
from tests.hostile.case import chat_prompt, drawn

PROMPT = chat_prompt("What?", 1)


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what may become of it.

    Attributes:
        name: of its own.
        prompt: as ``LLM.generate`` takes it.
        picture: what it shows, as this test reads it: features that come back have to be those of
            Transformers for it. None where it has to be refused.
    """

    name: str
    prompt: Any
    picture: Image.Image | None = None


def showing(image: Any, text: str = PROMPT) -> dict[str, Any]:
    return {"prompt": text, "multi_modal_data": {"image": image}}


def prompts(seed: str) -> Iterator[Prompt]:
    return itertools.chain(opened(seed), arrays(seed), features(), texts(seed), tokens())


def opened(seed: str) -> Iterator[Prompt]:
    """Files that Pillow has opened and not read yet."""
    everything = itertools.chain(
        files.written(seed),
        files.turned(seed),
        files.animated(seed),
        files.cut(seed, 8),
        files.damaged(seed, 12),
        files.polyglots(seed),
        files.shapes(seed),
    )
    for name, _, content in everything:
        try:
            image = Image.open(io.BytesIO(content))
        except Exception:  # there is nothing to be shown
            continue
        yield Prompt(name, showing(image), files.read(content))
    closed = drawn(seed)
    closed.close()
    yield Prompt("a picture that was closed", showing(closed))


def arrays(seed: str) -> Iterator[Prompt]:
    picture = drawn(seed)
    pixels = np.asarray(picture)
    whole = {
        "an array": pixels,
        "an array from right to left": np.ascontiguousarray(pixels[:, ::-1])[:, ::-1],
        "a tensor": torch.from_numpy(pixels.copy()).permute(2, 0, 1),
    }
    for name, value in whole.items():
        yield Prompt(name, showing(value), picture)
    grey = pixels[:, :, 0]
    yield Prompt("an array of two dimensions", showing(grey), Image.fromarray(grey).convert("RGB"))
    broken: dict[str, Any] = {
        "NaN": np.full((30, 40, 3), np.nan, np.float32),
        "one infinity": torch.zeros(3, 30, 40).index_fill(0, torch.tensor(0), float("inf")),
        "five dimensions": pixels[None, None],
        "seven channels": np.zeros((30, 40, 7), np.uint8),
        "no height": np.zeros((0, 40, 3), np.uint8),
        "objects": np.full((30, 40, 3), None, object),
        "letters": np.full((30, 40, 3), "x"),
    }
    for name, value in broken.items():
        yield Prompt(f"an array of {name}", showing(value))
    for value in (5, None, b"x", "picture.png", {"image": picture}, object):
        yield Prompt(f"for a picture {value!r:.20}", showing(value))
    for value in ("x", {"picture": picture}, {"video": pixels[None]}, {"image": [picture] * 5}):
        yield Prompt(f"as data {value!r:.20}", {"prompt": PROMPT, "multi_modal_data": value})
    for uuids in ({"image": ["a", "b"]}, {"image": [5]}, {"image": []}):
        yield Prompt(f"uuids {uuids}", showing(picture) | {"multi_modal_uuids": uuids})


def features() -> Iterator[Prompt]:
    """What is no embedding. With three or four dimensions it is pictures, in Python."""
    for name, value in embeds.tensors():
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            continue
        if value.ndim not in (0, 3, 4) and not value.is_meta and value.numel() < 10**9:
            yield Prompt(name, showing(value))


def texts(seed: str) -> Iterator[Prompt]:
    picture = drawn(seed)
    for index, text in enumerate(placeholders.REAL_TAGS):
        yield Prompt(f"the tag {index} and no picture", {"prompt": text})
        both = chat_prompt(f"What {text}?", 1)
        yield Prompt(f"the tag {index} beside a picture", showing(picture, both))
        yield Prompt(f"the tag {index} before a picture", showing(picture, text + PROMPT))
    for index, text in enumerate(placeholders.NO_TAGS):
        own = drawn(f"{seed}-{index}")
        yield Prompt(f"no tag {index}", showing(own, chat_prompt(text, 1)), own)
    for value in ("", None, 5.5, [], "a\ud83d"):
        yield Prompt(f"a prompt of {value!r}", {"prompt": value})


def tokens() -> Iterator[Prompt]:
    tag = placeholders.TAG_ID
    for value in (
        [],
        [-1],
        [placeholders.VOCABULARY],
        [2**70],
        ["a"],
        [tag],
        [7, tag, tag],
        [None],
    ):
        yield Prompt(f"tokens {value}", {"prompt_token_ids": value})

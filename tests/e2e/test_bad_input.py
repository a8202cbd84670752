# SPDX-License-Identifier: Apache-2.0
"""Bad input offline: an error that says what was wrong, and the next request works.

Over HTTP the same is in ``test_server``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm import LLM
from vllm.exceptions import VLLMClientError

from tests.e2e.engines import Ask, engine, greedy
from tests.reference import Reference
from vllm_spyre_mm.demo import pictures

PICTURE = pictures.draw_picture((pictures.Shape("circle", "red", "top left"),), (90, 60)).image
GOOD = Ask("What is in the picture?", (PICTURE,))


@pytest.fixture(scope="module")
def llm(demo_checkpoint: Path) -> Iterator[LLM]:
    with engine(demo_checkpoint, max_model_len=1024) as llm:
        yield llm


def prompt(text: str, *images: Any) -> dict[str, Any]:
    return {"prompt": text, "multi_modal_data": {"image": list(images)}}


TAG = "<|user|>\n<image>\nWhat?\n<|assistant|>\n"
TWO_TAGS = "<|user|>\n<image>\n<image>\nWhat?\n<|assistant|>\n"
NO_TAG = "<|user|>\nWhat?\n<|assistant|>\n"

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a picture of no width": (prompt(TAG, Image.new("RGB", (0, 10))), "0x10"),
    "a picture of no height": (prompt(TAG, Image.new("RGB", (10, 0))), "10x0"),
    "a tag too many": (prompt(TWO_TAGS, PICTURE), "belong to no image"),
    "a tag and no picture": ({"prompt": TAG}, "belong to no image"),
    "a picture and no tag": (prompt(NO_TAG, PICTURE), r"has 0 image tag\(s\) for 1 image\(s\)"),
    "more pictures than the limit": (prompt(TAG * 5, *[PICTURE] * 5), "At most 4 image"),
    "more features than the model length": (
        prompt(TAG * 4, *[Image.new("RGB", (300, 300))] * 4),
        "longer than the maximum model length of 1024",
    ),
    "image tokens by id": ({"prompt_token_ids": [7, 5, 5, 9]}, r"has 2 image token\(s\)"),
    "a picture of another type": (prompt(TAG, "picture.jpg"), "image"),
    "an embedding for a picture": (prompt(TAG, torch.ones(4, 256)), "enable-mm-embeds"),
}


@pytest.mark.parametrize("what", list(BAD))
def test_it_is_refused_and_the_next_request_works(
    llm: LLM, demo_reference: Reference, what: str
) -> None:
    bad, sentence = BAD[what]
    with pytest.raises((VLLMClientError, ValueError, TypeError), match=sentence):
        llm.generate([bad], greedy(4), use_tqdm=False)
    output = llm.generate([GOOD.prompt], greedy(16), use_tqdm=False)[0].outputs[0]
    assert list(output.token_ids) == demo_reference.generate(GOOD.text, [PICTURE], 16)
    assert output.mm_embedding is not None


def test_a_bad_request_takes_no_good_one_with_it(llm: LLM, demo_reference: Reference) -> None:
    """vLLM checks every prompt of a call before the engine sees any."""
    with pytest.raises(VLLMClientError, match="belong to no image"):
        llm.generate([GOOD.prompt, BAD["a tag too many"][0]], greedy(4), use_tqdm=False)
    output = llm.generate([GOOD.prompt], greedy(16), use_tqdm=False)[0].outputs[0]
    assert list(output.token_ids) == demo_reference.generate(GOOD.text, [PICTURE], 16)

# SPDX-License-Identifier: Apache-2.0
"""Bad input offline: an error that says what was wrong, and the next request works.

Over HTTP the same is in ``test_server``.
"""

import random
from collections.abc import Callable, Iterator
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

QUESTION = "What is in the picture?"


def drawn(seed: str) -> Image.Image:
    """A picture of its own for each test: the engine has not seen it."""
    rng = random.Random(f"bad-input-{seed}")
    return pictures.draw_picture(pictures.random_shapes(rng, 2), (90, 60), rng=rng).image


@pytest.fixture(scope="module")
def llm(demo_checkpoint: Path) -> Iterator[LLM]:
    with engine(demo_checkpoint, max_model_len=1024) as llm:
        yield llm


def prompt(text: str, *images: Any) -> dict[str, Any]:
    return {"prompt": text, "multi_modal_data": {"image": list(images)}}


TAG = "<|user|>\n<image>\nWhat?\n<|assistant|>\n"
TWO_TAGS = "<|user|>\n<image>\n<image>\nWhat?\n<|assistant|>\n"
NO_TAG = "<|user|>\nWhat?\n<|assistant|>\n"

BAD: dict[str, tuple[Callable[[Image.Image], dict[str, Any]], str]] = {
    "no width": (lambda _: prompt(TAG, Image.new("RGB", (0, 10))), "empty: 0x10 pixels"),
    "no height": (lambda _: prompt(TAG, Image.new("L", (10, 0))), "empty: 10x0 pixels"),
    "a tag too many": (lambda picture: prompt(TWO_TAGS, picture), "belong to no image"),
    "a tag and no picture": (lambda _: {"prompt": TAG}, "belong to no image"),
    "a picture and no tag": (
        lambda picture: prompt(NO_TAG, picture),
        r"has 0 image tag\(s\) for 1 image\(s\)",
    ),
    "more pictures than the limit": (
        lambda picture: prompt(TAG * 5, *[picture] * 5),
        "At most 4 image",
    ),
    "more features than the model length": (
        lambda picture: prompt(TAG * 4, picture, *[Image.new("RGB", (300, 300))] * 3),
        "longer than the maximum model length of 1024",
    ),
    "image tokens by id": (
        lambda _: {"prompt_token_ids": [7, 5, 5, 9]},
        r"has 2 image token\(s\)",
    ),
    "a picture of another type": (lambda _: prompt(TAG, "picture.jpg"), "image"),
    "an embedding for a picture": (lambda _: prompt(TAG, torch.ones(4, 256)), "enable-mm-embeds"),
}


def still_works(llm: LLM, reference: Reference, picture: Image.Image) -> None:
    """The next request is answered, about the very picture that the refused one showed."""
    ask = Ask(QUESTION, (picture,))
    output = llm.generate([ask.prompt], greedy(16), use_tqdm=False)[0].outputs[0]
    assert list(output.token_ids) == reference.generate(ask.text, [picture], 16)
    assert output.mm_embedding is not None


@pytest.mark.parametrize("what", list(BAD))
def test_it_is_refused_and_the_next_request_works(
    llm: LLM, demo_reference: Reference, what: str
) -> None:
    make, sentence = BAD[what]
    picture = drawn(what)
    with pytest.raises((VLLMClientError, ValueError, TypeError), match=sentence):
        llm.generate([make(picture)], greedy(4), use_tqdm=False)
    still_works(llm, demo_reference, picture)


BAD_PARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "prompt_logprobs": ({"prompt_logprobs": 1}, "prompt_logprobs is not supported"),
    "too many logprobs": ({"logprobs": 9999}, "9999"),
    "a token that does not exist": ({"logit_bias": {10**6: 1.0}}, "1000000"),
}


@pytest.mark.parametrize("what", list(BAD_PARAMETERS))
def test_parameters_are_refused_and_the_next_request_works(
    llm: LLM, demo_reference: Reference, what: str
) -> None:
    """Platform's refusals and vLLM's own; each comes after the picture was processed."""
    parameters, sentence = BAD_PARAMETERS[what]
    picture = drawn(what)
    with pytest.raises((VLLMClientError, ValueError), match=sentence):
        llm.generate([prompt(TAG, picture)], greedy(4, **parameters), use_tqdm=False)
    still_works(llm, demo_reference, picture)


@pytest.mark.parametrize(
    "arguments",
    [{"mm_processor_cache_type": "shm"}, {"mm_processor_cache_gb": 0}, {}],
    ids=["shared memory", "no cache", "default"],
)
def test_the_next_request_works_with_every_cache_of_processed_pictures(
    demo_checkpoint: Path, demo_reference: Reference, arguments: dict[str, Any]
) -> None:
    """With the engine in a process of its own, which the shared memory is there for."""
    picture = drawn("caches")
    with engine(demo_checkpoint, own_process=True, max_model_len=1024, **arguments) as llm:
        with pytest.raises(VLLMClientError, match="prompt_logprobs is not supported"):
            llm.generate([prompt(TAG, picture)], greedy(4, prompt_logprobs=1), use_tqdm=False)
        still_works(llm, demo_reference, picture)
        still_works(llm, demo_reference, picture)


def test_a_bad_request_takes_no_good_one_with_it(llm: LLM, demo_reference: Reference) -> None:
    """vLLM aborts the requests of a call that it submitted before a refused one."""
    picture = drawn("beside")
    good, bad = Ask(QUESTION, (picture,)).prompt, prompt(TWO_TAGS, picture)
    with pytest.raises(VLLMClientError, match="belong to no image"):
        llm.generate([good, bad], greedy(4), use_tqdm=False)
    still_works(llm, demo_reference, picture)

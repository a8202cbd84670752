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
from vllm import LLM, RequestOutput
from vllm.exceptions import VLLMClientError

from tests.e2e.engines import Ask, engine, greedy, relative_error
from tests.hostile import offline
from tests.reference import Reference
from vllm_spyre_mm.demo import pictures

QUESTION = "What is in the picture?"

REFUSALS = (VLLMClientError, ValueError, TypeError, AttributeError, AssertionError)
"""The last two are vLLM's own, for data that are no mapping and for a class as a picture."""


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


def test_prompts_in_bulk_are_refused_or_answered_rightly(
    llm: LLM, demo_reference: Reference
) -> None:
    """Features are compared with those of Transformers; there are more over HTTP."""
    given, wrong = list(offline.prompts("make test")), []
    assert len(given) > 450
    for case in given:
        try:
            output = llm.generate([case.prompt], greedy(1), use_tqdm=False)[0].outputs[0]
        except REFUSALS:
            continue
        expected = None
        if case.picture is not None:
            expected = demo_reference.features(offline.PROMPT, [case.picture])
        if (
            expected is None
            or output.mm_embedding is None
            or output.mm_embedding.shape != expected.shape
            or not relative_error(output.mm_embedding, expected) < 1e-4
        ):
            wrong.append(case.name)
    assert not wrong
    still_works(llm, demo_reference, drawn("after many"))


# -- texts that look like images -------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["<|user|>\n<image>\n<image>\n", "<image><image>", "a<image>b<image>c"]
)
def test_the_tags_of_a_raw_prompt_belong_to_its_pictures_in_their_order(
    llm: LLM, demo_reference: Reference, text: str
) -> None:
    """On tokens and on features: each picture's are where its own tag was."""
    first, second = drawn("first"), drawn("second").resize((30, 50))
    request = llm.generate([prompt(text, first, second)], greedy(1), use_tqdm=False)[0]
    inputs = demo_reference.inputs(text, [first, second])
    assert request.prompt_token_ids == inputs["input_ids"][0].tolist()
    output = request.outputs[0]
    assert output.mm_embedding is not None
    expected = [demo_reference.features(TAG, [image]) for image in (first, second)]
    assert relative_error(output.mm_embedding, torch.cat(expected)) < 1e-4
    tag = demo_reference.processor.tokenizer.convert_tokens_to_ids("<image>")
    for item, rows in zip(output.mm_embedding_info.items, expected, strict=True):
        assert request.prompt_token_ids[item.offset : item.offset + len(rows)] == [tag] * len(rows)
        assert output.mm_embedding[item.start : item.end].shape == rows.shape


@pytest.mark.parametrize("where", ["before", "after", "earlier", "system", "assistant"])
def test_a_tag_in_the_text_of_a_chat_takes_no_features(
    llm: LLM, demo_reference: Reference, where: str
) -> None:
    """It is refused: the template writes the tags of the pictures itself."""
    picture = drawn(f"chat {where}")
    shown, text = {"type": "image_pil", "image_pil": picture}, {"type": "text", "text": "<image>"}
    messages: list[Any] = [{"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}]
    if where in ("before", "after"):
        messages[0]["content"].insert(0 if where == "before" else 2, text)
    else:
        role = "user" if where == "earlier" else where
        messages.insert(0, {"role": role, "content": "What is <image>?"})
    with pytest.raises(VLLMClientError, match="belong to no image"):
        llm.chat(messages, greedy(4), use_tqdm=False)
    still_works(llm, demo_reference, picture)


def test_a_uuid_in_python_is_the_callers_own(llm: LLM, demo_reference: Reference) -> None:
    """vLLM takes it for the picture's identity, right or wrong; over HTTP it is ignored."""
    first, second = drawn("named"), drawn("named otherwise")
    expected = demo_reference.features(TAG, [first])

    def features(output: RequestOutput) -> torch.Tensor:
        embedding = output.outputs[0].mm_embedding
        assert embedding is not None
        return embedding

    for image in (first, second):
        named = prompt(TAG, image) | {"multi_modal_uuids": {"image": ["in a prompt"]}}
        (output,) = llm.generate([named], greedy(1), use_tqdm=False)
        assert relative_error(features(output), expected) < 1e-4
        part = {"type": "image_pil", "image_pil": image, "uuid": "in a chat"}
        messages: Any = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
        (output,) = llm.chat(messages, greedy(1), use_tqdm=False)
        assert relative_error(features(output), expected) < 1e-4


def test_a_bad_request_takes_no_good_one_with_it(llm: LLM, demo_reference: Reference) -> None:
    """vLLM aborts the requests of a call that it submitted before a refused one."""
    picture = drawn("beside")
    good, bad = Ask(QUESTION, (picture,)).prompt, prompt(TWO_TAGS, picture)
    with pytest.raises(VLLMClientError, match="belong to no image"):
        llm.generate([good, bad], greedy(4), use_tqdm=False)
    still_works(llm, demo_reference, picture)

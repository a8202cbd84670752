# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with the platform's flags, a real server, and the ``openai`` client."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.e2e.serving import chat, data_url, png, serve_command
from tests.reference import Reference
from vllm_spyre_mm.demo import pictures


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0) as client:
        yield client


def picture(seed: int) -> pictures.Picture:
    rng = random.Random(f"server-{seed}")
    return pictures.draw_picture(pictures.random_shapes(rng, 2), (96, 120), rng=rng)


def answer(
    reference: Reference, question: str, image: Image.Image | None = None, max_tokens: int = 24
) -> str:
    """Of Transformers, to a question about an image or about none."""
    images = [] if image is None else [image]
    tags = "<image>\n" * len(images)
    prompt = f"<|user|>\n{tags}{question}\n<|assistant|>\n"
    tokens = reference.generate(prompt, images, max_tokens)
    return reference.processor.decode(tokens, skip_special_tokens=True)


def still_works(
    client: openai.OpenAI, reference: Reference, image: Image.Image | None = None
) -> None:
    """The next request is answered: about ``image``, where the refused one showed a picture."""
    image, question = image or picture(1).image, "What is in the picture?"
    assert chat(client, question, data_url(png(image))) == answer(reference, question, image)


def test_chat_about_pictures(client: openai.OpenAI, demo_reference: Reference) -> None:
    still_works(client, demo_reference)
    question = "How many pictures are there?"
    assert chat(client, question) == answer(demo_reference, question)


def test_streaming_chat(client: openai.OpenAI, demo_reference: Reference) -> None:
    drawn, question = picture(2), "What is in the picture?"
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(png(drawn.image))}},
        {"type": "text", "text": question},
    ]
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": parts}],
        temperature=0,
        max_tokens=24,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == answer(demo_reference, question, drawn.image)


def test_text_completion(client: openai.OpenAI, demo_reference: Reference) -> None:
    question = "How many pictures are there?"
    prompt = f"<|user|>\n{question}\n<|assistant|>\n"
    response = client.completions.create(model="demo", prompt=prompt, max_tokens=8, temperature=0)
    assert response.choices[0].text == answer(demo_reference, question, max_tokens=8)


BROKEN_PICTURES = {
    "not a picture": b"this is text",
    "empty": b"",
    "truncated": png(Image.new("RGB", (200, 200), "red"))[:80],
}


@pytest.mark.parametrize("kind", sorted(BROKEN_PICTURES))
def test_a_broken_picture_is_a_400(
    client: openai.OpenAI, demo_reference: Reference, kind: str
) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(client, "What is in the picture?", data_url(BROKEN_PICTURES[kind]))
    still_works(client, demo_reference)


def test_a_decompression_bomb_is_a_400(client: openai.OpenAI, demo_reference: Reference) -> None:
    """A few kilobytes that unpack to 20,000 × 20,000 pixels."""
    bomb = png(Image.new("1", (20000, 20000)))
    with pytest.raises(openai.BadRequestError, match="pixels"):
        chat(client, "What is in the picture?", data_url(bomb))
    still_works(client, demo_reference)


def test_more_pictures_than_the_limit_are_a_400(
    client: openai.OpenAI, demo_reference: Reference
) -> None:
    image = picture(3).image
    with pytest.raises(openai.BadRequestError, match="At most 4 image"):
        chat(client, "How many pictures are there?", *[data_url(png(image))] * 5)
    still_works(client, demo_reference, image)


def test_an_image_tag_without_a_picture_is_a_400(
    client: openai.OpenAI, demo_reference: Reference
) -> None:
    with pytest.raises(openai.BadRequestError, match="belong to no image"):
        client.completions.create(
            model="demo", prompt="<|user|>\n<image>\nWhat?\n<|assistant|>\n", max_tokens=4
        )
    image = picture(4).image
    with pytest.raises(openai.BadRequestError):
        chat(client, "What is <image> in the picture?", data_url(png(image)))
    still_works(client, demo_reference, image)


def test_a_prompt_beyond_the_model_length_is_a_400(
    client: openai.OpenAI, demo_reference: Reference
) -> None:
    image = Image.new("RGB", (400, 400), "blue")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        chat(client, "How many pictures are there?", *[data_url(png(image))] * 4)
    still_works(client, demo_reference, image)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"prompt_logprobs": 1}, "prompt_logprobs is not supported"),
        ({"logprobs": True, "top_logprobs": 9999}, "9999"),
        ({"logit_bias": {"1000000": 1.0}}, "1000000"),
    ],
    ids=["prompt_logprobs", "too many logprobs", "a token that does not exist"],
)
def test_parameters_that_cannot_be_honoured_are_a_400(
    client: openai.OpenAI, demo_reference: Reference, asked: dict[str, Any], sentence: str
) -> None:
    image = picture(10 + len(sentence)).image  # one that no other request has shown
    with pytest.raises(openai.BadRequestError, match=sentence):
        chat(client, "What?", data_url(png(image)), extra_body=asked)
    still_works(client, demo_reference, image)


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 5000), (3, 700)])
def test_extreme_sizes_are_answered_as_transformers_answers(
    client: openai.OpenAI, demo_reference: Reference, size: tuple[int, int]
) -> None:
    image = Image.new("RGB", size, "green")
    question = "How many shapes are in the picture?"
    assert chat(client, question, data_url(png(image))) == answer(demo_reference, question, image)


def test_another_device_is_refused_with_a_sentence(demo_checkpoint: Path) -> None:
    command = serve_command(demo_checkpoint, 1)
    command[command.index("--device") + 1] = "cuda"
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode != 0
    assert "--device cuda: vllm-spyre-mm makes Spyre the platform" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_streaming_client_of_the_examples(server: str, tmp_path: Path) -> None:
    client = Path(__file__).parents[2] / "examples" / "online_serving" / "streaming_client.py"
    command = [sys.executable, str(client), "--address", server]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert "Traceback" not in finished.stderr
    # 120 x 120 pixels: 6 x 6 base features; 3 x 3 tiles of 6 x 6, a newline after each row.
    embedding = f"mm_embedding: ({36 + 18 * 19}, 256)"
    assert finished.stdout.splitlines() == ["a red circle at the top left", embedding]

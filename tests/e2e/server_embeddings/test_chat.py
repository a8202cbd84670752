# SPDX-License-Identifier: Apache-2.0
"""The embedding in answers to chats and completions."""

from typing import Any

import openai
import pytest
import torch
from pydantic import BaseModel
from starlette.responses import JSONResponse
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponse,
    ChatCompletionStreamResponse,
)

from tests.e2e.engines import relative_error
from tests.e2e.server_embeddings.requests import (
    QUESTION,
    ask,
    drawn,
    embeds_part,
    expected_features,
    messages,
    parts_of,
    post_raw,
)
from tests.reference import Reference
from vllm_spyre_mm.payload import decode_mm_embedding


def test_chat_returns_the_features(client: openai.OpenAI, demo_reference: Reference) -> None:
    images = (drawn(1), drawn(2, (50, 120)))
    payload = ask(client, *images).choices[0].mm_embedding
    assert payload["encoding_format"] == "base64"
    assert payload["dtype"] == "float32"
    embedding = decode_mm_embedding(payload)
    assert relative_error(embedding, expected_features(demo_reference, *images)) < 1e-4
    first, second = payload["items"]
    assert (first["index"], second["index"]) == (0, 1)
    assert first["end"] == second["start"]
    assert second["end"] == payload["shape"][0]
    grid = {"start": 0, "rows": 6, "columns": 6, "stride": 6, "tile": None}
    assert first["layout"]["base"] == grid
    assert first["layout"]["frames"] == 1
    assert payload["levels"] == 0


def test_nested_floats_are_the_same_numbers(client: openai.OpenAI) -> None:
    image = drawn(3, (48, 48))
    plain = ask(client, image).choices[0].mm_embedding
    extra = {"return_mm_embedding": {"pooling": "raw"}, "encoding_format": "float"}
    floats = ask(client, image, extra_body=extra).choices[0].mm_embedding
    assert isinstance(floats["data"][0][0], float)
    assert torch.equal(decode_mm_embedding(floats), decode_mm_embedding(plain))


def test_int8_rows_come_with_their_scales(client: openai.OpenAI) -> None:
    image = drawn(4)
    exact = decode_mm_embedding(ask(client, image).choices[0].mm_embedding)
    payload = ask(client, image, extra_body={"return_mm_embedding": {"dtype": "int8"}})
    payload = payload.choices[0].mm_embedding
    assert payload["dtype"] == "int8"
    error = (decode_mm_embedding(payload) - exact).abs().amax(dim=1)
    bound = exact.abs().amax(dim=1) / 254
    assert (error <= bound * 1.001).all()
    assert error.max() > 0


def test_a_stream_carries_it_on_the_chunk_that_finishes(client: openai.OpenAI) -> None:
    image = drawn(5)
    sampling: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 3}
    stream = ask(client, image, stream=True, **sampling)
    chunks = [choice for chunk in stream for choice in chunk.choices]
    finished = [choice for choice in chunks if choice.finish_reason is not None]
    assert sorted(choice.index for choice in finished) == [0, 1]
    whole = ask(client, image, **sampling).choices[0]
    for choice in finished:
        assert choice.mm_embedding == whole.mm_embedding
    assert not any(hasattr(choice, "mm_embedding") for choice in chunks if choice not in finished)
    text = "".join(choice.delta.content or "" for choice in chunks if choice.index == 0)
    assert text == whole.message.content


def test_completions_with_text_have_none(client: openai.OpenAI) -> None:
    asked = {"return_mm_embedding": True}
    prompts = ["<|user|>\nHi\n<|assistant|>\n", "<|user|>\nWho?\n<|assistant|>\n"]
    whole = client.completions.create(
        model="demo", prompt=prompts, max_tokens=4, temperature=0, extra_body=asked
    )
    assert [choice.mm_embedding for choice in whole.choices] == [None, None]
    chunks = list(
        client.completions.create(
            model="demo", prompt=prompts, max_tokens=4, temperature=0, stream=True, extra_body=asked
        )
    )
    finished = [
        choice for chunk in chunks for choice in chunk.choices if choice.finish_reason is not None
    ]
    assert len(finished) == 2
    assert all(choice.mm_embedding is None for choice in finished)


def undeclared(model: BaseModel) -> set[str]:
    """Fields of a response that vLLM's own model of it does not have."""
    found = set(model.model_extra or ())
    for value in (getattr(model, name) for name in type(model).model_fields):
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, BaseModel):
                found |= undeclared(each)
    return found


def test_without_the_field_a_response_is_vllms_byte_for_byte(server: str) -> None:
    """Read into vLLM's models and written as vLLM writes them, they are the same bytes."""
    body = {"model": "demo", "messages": messages(drawn(6)), "max_tokens": 8, "temperature": 0}
    raw = post_raw(f"{server}/v1/chat/completions", body)
    response = ChatCompletionResponse.model_validate_json(raw)
    assert undeclared(response) == set()
    assert JSONResponse(response.model_dump()).body == raw
    lines = post_raw(f"{server}/v1/chat/completions", {**body, "stream": True}).splitlines()
    events = [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: {")]
    assert len(events) > 2
    for event in events:
        chunk = ChatCompletionStreamResponse.model_validate_json(event)
        assert undeclared(chunk) == set()
        assert chunk.model_dump_json(exclude_unset=True).encode() == event


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("yes", "must be true, false or an object"),
        ({"pooling": "median"}, "pooling"),
        ({"pool": "raw"}, "pool"),
        ({"pooling": "grid"}, "grid"),
        ({"dtype": "int4"}, "dtype"),
        ({"max_bytes": 100}, "more than the limit of 100"),
        ({"generate": False}, "max_tokens=1"),
    ],
    ids=str,
)
def test_a_choice_that_there_is_not_is_the_clients_error(
    client: openai.OpenAI, value: object, named: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=named):
        ask(client, drawn(7), extra_body={"return_mm_embedding": value})
    assert ask(client, drawn(7)).choices[0].mm_embedding is not None


def test_a_response_that_would_be_too_large_is_refused(client: openai.OpenAI) -> None:
    images = [drawn(seed) for seed in range(10, 13)]
    with pytest.raises(openai.BadRequestError, match="more than the limit of 700000"):
        ask(client, *images)
    pooled = {"return_mm_embedding": {"pooling": "grid", "grid": [4, 4]}}
    payload = ask(client, *images, extra_body=pooled).choices[0].mm_embedding
    assert payload["shape"] == [3 * 16, 256]


def test_a_returned_tensor_goes_back_in_as_the_image(client: openai.OpenAI) -> None:
    image = drawn(8)
    seen = ask(client, image).choices[0]
    content: Any = [embeds_part(seen.mm_embedding), {"type": "text", "text": QUESTION}]
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=16
    )
    assert answer.choices[0].message.content == seen.message.content


@pytest.mark.parametrize("given", ["pe", "ep"])
def test_tensors_and_pictures_side_by_side(client: openai.OpenAI, given: str) -> None:
    images = [drawn(8, (60, 90)), drawn(9, (90, 60))]
    seen = ask(client, *images).choices[0]
    content = [
        embeds_part(ask(client, image).choices[0].mm_embedding) if kind == "e" else part
        for kind, image, part in zip(given, images, parts_of(*images), strict=True)
    ]
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}],  # type: ignore[list-item, misc]
        temperature=0,
        max_tokens=16,
        extra_body={"return_mm_embedding": True},
    ).choices[0]
    assert answer.message.content == seen.message.content
    expected = decode_mm_embedding(seen.mm_embedding)
    assert relative_error(decode_mm_embedding(answer.mm_embedding), expected) < 1e-5  # type: ignore[attr-defined]


def test_the_models_list_says_that_it_is_there(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    told = {
        "hidden_size": 256,
        "levels": 0,
        "modalities": ["image"],
        "dtype": "float32",
        "max_bytes": 700_000,
    }
    assert model.mm_embedding == told  # type: ignore[attr-defined]

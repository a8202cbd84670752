# SPDX-License-Identifier: Apache-2.0
"""The embedding over HTTP, with a real server and the ``openai`` client."""

import io
import json
import random
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from starlette.responses import JSONResponse
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponse,
    ChatCompletionStreamResponse,
)

from tests.e2e.engines import relative_error
from tests.e2e.serving import data_url, png, running_server
from tests.reference import Reference
from vllm_spyre_mm.demo import pictures
from vllm_spyre_mm.payload import decode_mm_embedding

QUESTION = "What is in the picture?"
MAX_QUEUED = 8
"""Requests that the server takes at a time."""


def drawn(seed: int, size: tuple[int, int] = (192, 144)) -> Image.Image:
    rng = random.Random(f"server-embeddings-{seed}")
    return pictures.draw_picture(pictures.random_shapes(rng, 2), size, rng=rng).image


@pytest.fixture(scope="module")
def server(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    settings = json.dumps({"max_mm_embedding_response_bytes": 700_000})
    flags = (
        *("--additional-config", settings),
        *("--max-num-queued-reqs", str(MAX_QUEUED)),
        "--enable-mm-embeds",
        "--enable-scale-out",
    )
    developing = {"VLLM_SERVER_DEV_MODE": "1"}
    with running_server(demo_checkpoint, log, *flags, environment=developing) as address:
        yield address


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0) as client:
        yield client


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
    assert first["layout"]["base"] == {"start": 0, "rows": 6, "columns": 6, "stride": 6}


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


def embeds_part(payload: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(decode_mm_embedding(payload), buffer)
    return {"type": "image_embeds", "image_embeds": b64encode(buffer.getvalue()).decode()}


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
    told = {"hidden_size": 256, "dtype": "float32", "max_bytes": 700_000}
    assert model.mm_embedding == told  # type: ignore[attr-defined]


# -- metrics ---------------------------------------------------------------------------------------


def metrics(server: str) -> dict[str, float]:
    """The platform's, by name."""
    with urllib.request.urlopen(f"{server}/metrics", timeout=60) as response:
        families = text_string_to_metric_families(response.read().decode())
    return {
        sample.name.removeprefix("vllm:spyre_"): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("vllm:spyre_") and not sample.name.endswith("_created")
    }


def held_bytes(server: str, *, wanted: bool) -> float:
    """The gauge, once it is zero or is not: a step's statistics come after its output."""
    deadline = time.monotonic() + 60
    while bool(held := metrics(server)["mm_embedding_held_bytes"]) != wanted:
        assert time.monotonic() < deadline, f"{held} bytes are held"
    return held


def test_metrics_count_and_are_zero_when_nothing_runs(server: str, client: openai.OpenAI) -> None:
    assert held_bytes(server, wanted=False) == 0
    before, image = metrics(server), drawn(20)
    rows, width = ask(client, image).choices[0].mm_embedding["shape"]
    with client.chat.completions.create(
        model="demo",
        messages=messages(image),
        max_tokens=1000,
        stream=True,
        extra_body={"return_mm_embedding": True, "ignore_eos": True},
    ) as abandoned:
        next(iter(abandoned))
        assert held_bytes(server, wanted=True) == rows * width * 4
    assert held_bytes(server, wanted=False) == 0
    ask(client, image, extra_body={})
    grown = {name: value - before[name] for name, value in metrics(server).items()}
    # The prefix cache covers most of the picture the third time, but not all of it.
    assert grown == {
        "mm_embedding_held_bytes": 0,
        "encoder_runs_total": 1,
        "encoder_cache_hits_total": 2,
        "mm_embeddings_returned_total": 2,
    }


# -- images alone ----------------------------------------------------------------------------------


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


def test_images_alone_have_the_embeddings_that_a_chat_returns(
    server: str, client: openai.OpenAI
) -> None:
    images = (drawn(20), drawn(21, (60, 90)))
    status, body = post(server, {"input": parts_of(*images)})
    assert status == 200
    asked = ask(client, *images).choices[0]
    found, wanted = body["mm_embedding"], asked.mm_embedding
    assert torch.equal(decode_mm_embedding(found), decode_mm_embedding(wanted))
    assert [item["content_hash"] for item in found["items"]] == [
        item["content_hash"] for item in wanted["items"]
    ]


def test_a_prompt_is_answered_rightly_after_its_images_were_embedded_alone(
    server: str, client: openai.OpenAI
) -> None:
    """No decoder ran for them: their blocks must not be found in the prefix cache."""
    image = drawn(22)
    for _ in range(2):
        assert post(server, {"input": parts_of(image)})[0] == 200
    after = ask(client, image).choices[0].message.content
    fresh = ask(client, image, extra_body={"cache_salt": "fresh"}).choices[0].message.content
    assert after == fresh
    assert len(after) > 10


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"input": [{"type": "text", "text": "hello"}]}, "images alone, not text"),
        ({"input": []}, "input"),
        ({}, "input"),
        ({"input": parts_of(Image.new("RGB", (9, 9))), "return_mm_embedding": False}, "false"),
        ({"input": parts_of(Image.new("RGB", (9, 9))), "return_mm_embedding": "yes"}, "str"),
        ({"input": parts_of(Image.new("RGB", (9, 9))), "dimensions": 5}, "dimensions"),
        (
            {"input": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
            "Failed to load image",
        ),
        ({"input": parts_of(Image.new("RGB", (9, 9))), "model": "other"}, "other"),
    ],
    ids=[
        "text",
        "empty",
        "missing",
        "false",
        "text for a choice",
        "unknown field",
        "no picture",
        "another model",
    ],
)
def test_what_is_no_image_is_the_clients_error(server: str, body: Any, named: str) -> None:
    status, answer = post(server, body)
    assert 400 <= status < 500
    assert named in json.dumps(answer)
    assert post(server, {"input": parts_of(drawn(23))})[0] == 200


# -- every route -----------------------------------------------------------------------------------


def of_responses(seed: int) -> Any:
    """A question about a picture for OpenAI's newer API."""
    picture = {"type": "input_image", "image_url": data_url(png(drawn(seed))), "detail": "auto"}
    content = [picture, {"type": "input_text", "text": QUESTION}]
    return {"input": [{"role": "user", "content": content}], "max_output_tokens": 4}


def of_anthropic(seed: int) -> Any:
    data = b64encode(png(drawn(seed))).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    content = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    return {"max_tokens": 4, "messages": [{"role": "user", "content": content}], "model": "demo"}


def of_chats(*seeds: int) -> Any:
    return {"messages": [messages(drawn(seed)) for seed in seeds], "max_tokens": 4}


def of_beams(seed: int) -> Any:
    more = {"use_beam_search": True, "n": 3, "max_tokens": 4}
    return {"messages": messages(drawn(seed)), **more}


def rendered(server: str, seed: int) -> Any:
    """A question as a server that only renders hands it to others."""
    body = {"messages": messages(drawn(seed)), "max_tokens": 4}
    status, request = post(server, body, "/v1/chat/completions/render")
    assert status == 200
    return request


def returned(server: str) -> float:
    """Embeddings that were returned so far; a step's statistics come after its output."""
    held_bytes(server, wanted=False)
    return metrics(server)["mm_embeddings_returned_total"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", of_responses(40)),
        ("/v1/messages", of_anthropic(41)),
        ("/v1/chat/completions", of_beams(42)),
        ("/inference/v1/generate", 43),
    ],
    ids=["responses", "messages", "beam search", "generate"],
)
def test_a_route_that_returns_none(server: str, path: str, body: Any) -> None:
    """It answers who does not ask, for whom nothing is returned, and says no to who does."""
    if isinstance(body, int):
        body = rendered(server, body)
    before = returned(server)
    status, answer = post(server, body, path)
    assert status == 200, answer
    for asked in (
        {"return_mm_embedding": True},
        {"vllm_xargs": {"return_mm_embedding": 1}},
        {"sampling_params": {"extra_args": {"return_mm_embedding": {"pooling": "raw"}}}},
    ):
        if "sampling_params" not in asked or "sampling_params" in body:
            status, answer = post(server, {**body, **asked}, path)
            assert status == 400
            assert "return_mm_embedding" in answer["error"]["message"]
    assert returned(server) == before


def test_a_batch_returns_the_embedding_of_each_conversation(
    server: str, client: openai.OpenAI
) -> None:
    path, body = "/v1/chat/completions/batch", of_chats(44, 45)
    before = returned(server)
    status, answer = post(server, body, path)
    assert status == 200, answer
    assert all("mm_embedding" not in choice for choice in answer["choices"])
    assert returned(server) == before

    body["messages"].append([{"role": "user", "content": "Hello"}])
    asked = {"return_mm_embedding": {"dtype": "float16"}}
    status, answer = post(server, {**body, **asked}, path)
    assert status == 200, answer
    *seen, text_only = (choice["mm_embedding"] for choice in answer["choices"])
    assert text_only is None
    for embedding, seed in zip(seen, (44, 45), strict=True):
        alone = ask(client, drawn(seed), extra_body=asked).choices[0].mm_embedding
        assert torch.equal(decode_mm_embedding(embedding), decode_mm_embedding(alone))

    too_many = of_chats(44, 45, 44, 45)  # each conversation has a share of the limit
    assert post(server, too_many, path)[0] == 200
    status, answer = post(server, {**too_many, "return_mm_embedding": True}, path)
    assert status == 400
    assert "more than the limit of 175000" in answer["error"]["message"]
    status, answer = post(server, {**body, "return_mm_embedding": {"pool": "raw"}}, path)
    assert status == 400


def test_a_picture_of_a_request_that_found_no_place_in_the_queue(server: str) -> None:
    """The engine never got the picture: it comes with the next request that shows it.

    vLLM looks for one place before it processes the pictures of a batch, and then for one for each
    conversation.
    """
    seeds = range(60, 61 + MAX_QUEUED)
    status, answer = post(server, of_chats(*seeds), "/v1/chat/completions/batch")
    assert status == 503, answer
    for seed in seeds:
        body = {"messages": messages(drawn(seed)), "max_tokens": 4}
        deadline = time.monotonic() + 60
        while (status := post(server, body, "/v1/chat/completions")[0]) == 503:
            assert time.monotonic() < deadline  # the others of the batch have not ended yet
            time.sleep(0.1)
        assert status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/sleep?level=1",
        "/sleep?level=2&mode=keep",
        "/release_kv_cache_memory",
        "/start_weight_update",
    ],
)
def test_what_the_engine_cannot_do_leaves_it_as_it_is(
    server: str, client: openai.OpenAI, path: str
) -> None:
    for paused in (False, True):
        if paused:
            assert post(server, {}, "/pause?mode=keep")[0] == 200
        status, answer = post(server, {}, path)
        assert status == 501
        assert answer["error"]["message"].startswith("not supported on Spyre: ")
        if paused:
            assert post(server, {}, "/resume")[0] == 200
    with urllib.request.urlopen(f"{server}/is_sleeping", timeout=60) as response:
        assert json.load(response) == {"is_sleeping": False}
    assert ask(client, drawn(47)).choices[0].message.content

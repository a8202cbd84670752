# SPDX-License-Identifier: Apache-2.0
"""Every other route returns the embedding too, or says that it does not."""

import json
import time
import urllib.error
import urllib.request
from base64 import b64encode
from typing import Any

import openai
import pytest
import torch

from tests.e2e.server_embeddings.requests import (
    MAX_QUEUED,
    QUESTION,
    ask,
    drawn,
    held_bytes,
    messages,
    post,
)
from tests.e2e.serving import data_url, metrics, png
from vllm_spyre_mm.payload import decode_mm_embedding


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


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/invocations", {"return_mm_embedding": True}),
        ("/v1/chat/completions", {"vllm_xargs": {"return_mm_embedding": 1}}),
    ],
    ids=["SageMaker's route", "vLLM's field"],
)
def test_another_way_to_ask(
    server: str, client: openai.OpenAI, path: str, asked: dict[str, Any]
) -> None:
    body = {"model": "demo", "messages": messages(drawn(48)), "max_tokens": 4}
    status, answer = post(server, {**body, **asked}, path)
    assert status == 200, answer
    expected = ask(client, drawn(48)).choices[0].mm_embedding
    assert answer["choices"][0]["mm_embedding"] == expected


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

# SPDX-License-Identifier: Apache-2.0
"""Metrics of images and embeddings, as a server exports them."""

import openai

from tests.e2e.server_embeddings.requests import ask, drawn, held_bytes, messages
from tests.e2e.serving import metrics


def test_metrics_count_and_are_zero_when_nothing_runs(server: str, client: openai.OpenAI) -> None:
    assert held_bytes(server, wanted=False) == 0
    before, image = metrics(server), drawn(25)
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

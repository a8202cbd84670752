# SPDX-License-Identifier: Apache-2.0
"""Bad input in bulk, over HTTP, and whose pictures are whose.

``make hostile`` sends all of the requests; here it is every second one.
"""

import base64
import dataclasses
import json

import pytest
import torch
from PIL import Image

from tests.hostile import embeds
from tests.hostile.all import all_cases
from tests.hostile.case import CHAT, EMBEDDINGS, Case, chat, chat_prompt, drawn, good_part, part_of
from tests.hostile.drive import Judge, send
from tests.hostile.upstream import upstream_cases
from tests.reference import Reference
from vllm_spyre_mm.payload import decode_mm_embedding

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def judge(demo_reference: Reference) -> Judge:
    return Judge(demo_reference)


def asking(seed: str, uuid: str | None = None) -> Case:
    """A chat about a picture that is right with the features and the answer of Transformers."""
    part = good_part(seed) | ({} if uuid is None else {"uuid": uuid})
    body = chat([part, {"type": "text", "text": QUESTION}], return_mm_embedding=True)
    return Case(seed, CHAT, body, "answered", (drawn(seed),), chat_prompt(QUESTION, 1))


def faults(judge: Judge, address: str, *cases: Case) -> dict[str, str]:
    """What is wrong with the answers to requests that are sent together, by the cases' names."""
    found = {answer.case.name: judge.fault(answer) for answer in send(address, cases)}
    return {name: fault for name, fault in found.items() if fault is not None}


# -- bad input -------------------------------------------------------------------------------------


def test_every_request_is_refused_or_answered_rightly(server: str, judge: Judge) -> None:
    """And a good one among them, and one after them."""
    everything = list(all_cases("make test"))
    assert len({case.name for case in everything}) == len(everything)
    cases = everything[::2]
    assert len(cases) >= 2000
    cases.insert(len(cases) // 2, asking("amid the hostile ones"))
    assert faults(judge, server, *cases) == {}
    assert faults(judge, server, asking("after the hostile ones")) == {}


@pytest.mark.parametrize("case", list(upstream_cases()), ids=lambda case: case.name)
def test_what_vllm_itself_answers_with_500(server: str, judge: Judge, case: Case) -> None:
    """Listed in docs/reliability.md; once vLLM refuses it, it belongs to the other requests."""
    (answer,) = send(server, [case])
    assert answer.status in (500, None)  # the connection is closed, sometimes before it is read
    assert faults(judge, server, asking(f"after {case.name}")) == {}


# -- whose pictures are whose ----------------------------------------------------------------------


def embedding_alone(name: str, *images: Image.Image) -> Case:
    parts = [part_of(image) for image in images]
    return Case(name, EMBEDDINGS, {"input": parts}, "answered", images)


def test_pictures_of_many_users_at_once_are_kept_apart(server: str, judge: Judge) -> None:
    """In one batch, and again from the caches: all get the features of their own.

    All of them call their requests the same.
    """
    sizes = [(48, 36), (30, 60), (90, 40)]
    cases = [asking(f"question {number}") for number in range(20)]
    for number in range(30):
        shown = [drawn(f"{number}-{place}", sizes[place]) for place in range(number % 3 + 1)]
        cases.append(embedding_alone(f"user {number}", *shown))
        cases.append(embedding_alone(f"user {number} in another order", *shown[::-1]))
    cases = [dataclasses.replace(case, headers={"X-Request-Id": "ours"}) for case in cases]
    again = [dataclasses.replace(case, name=f"{case.name} again") for case in reversed(cases)]
    assert faults(judge, server, *cases, *again) == {}


def test_one_uuid_for_the_pictures_of_two_users_is_ignored(server: str, judge: Judge) -> None:
    first, second = asking("first", uuid="mine"), asking("second", uuid="mine")
    assert faults(judge, server, first) == {}
    assert faults(judge, server, second) == {}
    at_once = [asking(f"user {number}", uuid="ours") for number in range(12)]
    assert faults(judge, server, *at_once) == {}


def test_the_key_of_anothers_picture_is_no_use(server: str, judge: Judge) -> None:
    """Responses show the keys that vLLM gives to pictures; as a uuid they are only a name."""
    (answer,) = send(server, [embedding_alone("the victim's", drawn("the victim's"))])
    (item,) = json.loads(answer.content)["mm_embedding"]["items"]
    assert faults(judge, server, asking("the other's", uuid=item["content_hash"])) == {}
    assert faults(judge, server, asking("the victim's")) == {}
    key = {"type": "image_url", "image_url": None, "uuid": item["content_hash"]}
    for path, body in ((CHAT, chat([key])), (EMBEDDINGS, {"input": [key]})):
        (answer,) = send(server, [Case("a key alone", path, body)])
        assert answer.status == 400
        assert b"named by its uuid alone" in answer.content


def test_embeddings_of_two_users_with_one_uuid_are_kept_apart(server: str) -> None:
    given = [embeds.good(9, seed) for seed in range(6)]
    cases = []
    for number, embedding in enumerate(given):
        content = base64.b64encode(embeds.saved(embedding)).decode()
        part = embeds.embedding_part(content) | {"uuid": "ours"}
        cases.append(Case(f"embedding {number}", EMBEDDINGS, {"input": [part]}))
    for answer, embedding in zip(send(server, cases), given, strict=True):
        returned = decode_mm_embedding(json.loads(answer.content)["mm_embedding"])
        assert torch.equal(returned, embedding)

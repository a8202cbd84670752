# SPDX-License-Identifier: Apache-2.0
"""Bodies that are no request: broken, deep or enormous JSON, at every address."""

import json
from collections.abc import Iterator

from tests.hostile.case import CHAT, COMPLETIONS, EMBEDDINGS, Case, chat, data_url

PATHS = (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    "/v1/responses",
    "/v1/messages",
    "/v1/chat/completions/batch",
    "/tokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
    "/invocations",
    "/generative_scoring",
    "/inference/v1/generate",
)

DEPTH = 100_000

BODIES: dict[str, bytes] = {
    "nothing": b"",
    "a space": b" ",
    "null": b"null",
    "a number": b"5",
    "a string": b'"x"',
    "a list": b"[]",
    "an empty object": b"{}",
    "half an object": b'{"model": "demo", "messages": [',
    "two objects": b"{}{}",
    "a comment": b'{"model": "demo" /* the model */}',
    "single quotes": b"{'model': 'demo'}",
    "a trailing comma": b'{"model": "demo",}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"model": "demo"}'.encode("utf-16"),
    "UTF-32": '{"model": "demo"}'.encode("utf-32"),
    "no UTF-8": b'{"model": "\xff\xfe\xfa"}',
    "half a character": '{"model": "漢'.encode()[:-1] + b'"}',
    "a lone surrogate": b'{"model": "demo", "prompt": "\\ud83d", "messages": [{"role": "user", '
    b'"content": "\\ud83d"}], "input": "\\ud83d"}',
    "control letters": b'{"model": "a\x01b"}',
    "zeros": bytes(1000),
    "deep lists": b"[" * DEPTH + b"]" * DEPTH,
    "deep open lists": b"[" * DEPTH,
    "deep objects": b'{"a":' * DEPTH + b"1" + b"}" * DEPTH,
    "deep content": b'{"model": "demo", "messages": [{"role": "user", "content": '
    + b"[" * 5000
    + b"]" * 5000
    + b"}]}",
    "deep input": b'{"input": [' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"]}",
    "a deep field": b'{"model": "demo", "prompt": "Hi", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a long number": b'{"model": "demo", "prompt": "Hi", "n": ' + b"9" * 100_000 + b"}",
    "a key many times": b'{"model": "demo"' + b', "prompt": "Hi"' * 5000 + b', "max_tokens": 1}',
    "many keys": json.dumps({f"key {number}": number for number in range(20_000)}).encode(),
    "a form": b"model=demo&prompt=Hi",
    "XML": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
}

HEADERS = (
    {"Content-Type": "text/plain"},
    {"Content-Type": "application/x-www-form-urlencoded"},
    {"Content-Type": "multipart/form-data; boundary=x"},
    {"Content-Type": "application/json; charset=utf-16"},
    {"Content-Type": ""},
    {"Content-Encoding": "gzip"},
    {"X-Request-Id": "../../etc/passwd"},
    {"X-Request-Id": "x" * 10_000},
    {"X-data-parallel-rank": "7"},
    {"X-data-parallel-rank": "x"},
    {"Accept": "image/png"},
    {"Authorization": "Bearer \xff"},
)


def body_cases() -> Iterator[Case]:
    for path in PATHS:
        for name, body in BODIES.items():
            if path != "/invocations" or not name.startswith("deep "):  # upstream.py
                yield Case(f"{name} to {path}", path, body)
    good = json.dumps(chat("Hi")).encode()
    for number, headers in enumerate(HEADERS):
        yield Case(f"headers {number}", CHAT, good, headers=headers)


def other_endpoint_cases() -> Iterator[Case]:
    """Pictures by the other endpoints of vLLM's."""
    urls = {
        "no picture": data_url(b"no picture"),
        "a file": "file:///etc/passwd",
        "no encoding": "data:image/png,AAAA",
        "nowhere": "nowhere",
        "no URL": "",
    }
    for name, url in urls.items():
        part = {"type": "input_image", "image_url": url}
        body = {
            "model": "demo",
            "max_output_tokens": 4,
            "input": [{"role": "user", "content": [part]}],
        }
        yield Case(f"{name} to /v1/responses", "/v1/responses", body, "refused")
        source = {"type": "url", "url": url}
        message = {"role": "user", "content": [{"type": "image", "source": source}]}
        body = {"model": "demo", "max_tokens": 4, "messages": [message]}
        yield Case(f"{name} to /v1/messages", "/v1/messages", body, "refused")
        source = {"type": "base64", "media_type": "image/png", "data": url}
        message = {"role": "user", "content": [{"type": "image", "source": source}]}
        yield Case(
            f"{name} as base64 to /v1/messages",
            "/v1/messages",
            body | {"messages": [message]},
            "refused",
        )
        part = {"type": "image_url", "image_url": {"url": url}}
        body = {"model": "demo", "messages": [{"role": "user", "content": [part]}]}
        yield Case(f"{name} to /tokenize", "/tokenize", body, "either")
        yield Case(
            f"{name} to the batch",
            "/v1/chat/completions/batch",
            body | {"messages": [body["messages"]]},
            "refused",
        )
        yield Case(f"{name} to /invocations", "/invocations", body, "refused")

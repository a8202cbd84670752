# SPDX-License-Identifier: Apache-2.0
"""URLs of pictures that are not to be fetched, or cannot be."""

from collections.abc import Iterator
from typing import Any

from tests.hostile.case import CHAT, EMBEDDINGS, QUESTION, Case, chat, image_part

LOCAL = (
    "file:///etc/passwd",
    "file:///etc/hostname",
    "file://localhost/etc/passwd",
    "file:/etc/passwd",
    "file:etc/passwd",
    "FILE:///etc/passwd",
    "file:///proc/self/environ",
    "file:///dev/zero",
    "file:///dev/stdin",
    "file:///",
    "file://",
    "file:",
    "file:///%2e%2e/%2e%2e/etc/passwd",
    "file:///etc/passwd\0.png",
    "file://host.invalid/share/picture.png",
    "file://///etc/passwd",
    "/etc/passwd",
    "../../etc/passwd",
    "~/picture.png",
    "picture.png",
)

SCHEMES = (
    "ftp://127.0.0.1/picture.png",
    "gopher://127.0.0.1:1/x",
    "javascript:alert(1)",
    "blob:http://127.0.0.1/1",
    "about:blank",
    "s3://bucket/picture.png",
    "hf://datasets/picture.png",
    "jar:file:///etc/passwd!/x",
    "dict://127.0.0.1:1/",
    "ldap://127.0.0.1:1/",
    "unix:///var/run/docker.sock",
    "httpx://127.0.0.1:1/",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock/",
    "://",
    ":",
    "//127.0.0.1:1/picture.png",
    "?",
    "#",
    " ",
    "\0",
    "漢字",
    "🙂",
    "\ud83d",
    "x" * 100_000,
    "http" * 10_000,
)

BROKEN = (
    "http://",
    "http:///picture.png",
    "http://[::1",
    "http://[zz]/",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:-1/",
    "http://127.0.0.1:port/",
    "http://user:password@/",
    "http://\0/",
    "http://a b/",
    "http://%zz/",
    "http://.../",
    "http://" + "a" * 300 + ".invalid/",
    "http://" + "a." * 200 + "invalid/",
    "http://xn--0/",
    "https://",
    "http:127.0.0.1",
    "http://127.0.0.1:0/",
)

UNREACHABLE = (
    "http://127.0.0.1:1/picture.png",
    "https://127.0.0.1:1/picture.png",
    "http://[::1]:1/picture.png",
    "http://nowhere.invalid/picture.png",
)
"""vLLM tries each of them several times, for some seconds."""

NO_TEXT: tuple[Any, ...] = (
    None,
    5,
    True,
    1.5,
    [],
    {},
    ["data:image/png;base64,AAAA"],
    {"url": ""},
    "",
)


def url_cases() -> Iterator[Case]:
    for number, url in enumerate((*LOCAL, *SCHEMES, *BROKEN, *UNREACHABLE, *NO_TEXT)):
        name = f"the URL {str(url)[:40]!r} ({number})"
        if number % 2:
            yield Case(name, EMBEDDINGS, {"input": [image_part(url)]}, "refused")
        else:
            parts = [image_part(url), {"type": "text", "text": QUESTION}]
            yield Case(name, CHAT, chat(parts), "refused")

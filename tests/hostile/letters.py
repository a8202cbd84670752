# SPDX-License-Identifier: Apache-2.0
"""The corners of Unicode."""

import json
from collections.abc import Iterator

from tests.hostile.case import (
    CHAT,
    COMPLETIONS,
    Case,
    chat,
    chat_prompt,
    completion,
    drawn,
    good_part,
)

UNICODE = {
    "a NUL": "a\0b",
    "control letters": "".join(map(chr, range(32))),
    "a byte order mark": "\ufeffHi",
    "the last character": "\U0010ffff",
    "no characters": "\ufffe\uffff",
    "private use": "\ue000\U000f0000",
    "combining marks": "e" + "\u0301" * 99,
    "right to left": "\u202eabc\u202c",
    "isolates": "\u2066" * 99,
    "zero width": "\u200b\u200c\u200d\u2060",
    "a family": "👨‍👩‍👧‍👦",
    "flags": "🇩🇪🇯🇵🇩",
    "skin": "👍🏿",
    "digits": "٣৪五Ⅷ½",
    "ligatures": "ﬁﬂﷺ",
    "full width": "Ｗｈａｔ？",
    "letters that fold": "ßİıſK",
    "line ends": "a\u2028b\u2029c\x85d\r\n",
    "spaces": "\u00a0\u2003\u3000\t",
    "tags": "\U000e0041\U000e007f",
    "variants": "☃\ufe0f\ufe0e",
    "Hangul": "각\u1100\u1161\u11a8",
    "mathematics": "𝕎𝕙𝕒𝕥",
    "Zalgo": "Z̸̧͔͝a̷̩̓l̸̛͙g̴̭̈́o̵͉̔",
    "half a word": "\u0e01\u0e33",
    "noncharacters": "\ufdd0\ufdef",
}


SURROGATES = {"a high surrogate": "\\ud83d", "a low one": "\\ude00", "swapped": "\\ude00\\ud83d"}


def unicode_cases(seed: str) -> Iterator[Case]:
    """Every text is text: the answer is what Transformers gives to it."""
    for name, text in UNICODE.items():
        yield Case(f"{name} in a chat", CHAT, chat(text), "answered", None, chat_prompt(text))
        yield Case(f"{name} in a completion", COMPLETIONS, completion(text), "answered", None, text)
        part, picture = good_part(f"{seed}-{name}"), drawn(f"{seed}-{name}")
        body = chat([part, {"type": "text", "text": text}], return_mm_embedding=True)
        yield Case(
            f"{name} beside a picture", CHAT, body, "answered", (picture,), chat_prompt(text, 1)
        )
        for field in ("stop", "cache_salt", "user", "request_id", "model"):
            yield Case(f"{name} as {field}", CHAT, chat("Hi", **{field: text}))
        yield Case(
            f"{name} as a role", CHAT, chat("") | {"messages": [{"role": text, "content": "Hi"}]}
        )
    for name, escape in SURROGATES.items():
        body = f'{{"model": "demo", "messages": [{{"role": "user", "content": "a{escape}b"}}]}}'
        yield Case(f"{name} in a chat", CHAT, body.encode())
        for field in ("prompt", "stop", "cache_salt", "user"):
            fields = {"model": "demo", "max_tokens": 4, "prompt": "Hi", field: "@"}
            body = json.dumps(fields).replace("@", escape)
            yield Case(f"{name} as {field} of a completion", COMPLETIONS, body.encode())

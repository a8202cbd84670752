# SPDX-License-Identifier: Apache-2.0
"""Requests that show what is no picture, or an odd one."""

import base64
import itertools
from collections.abc import Iterator

from tests.hostile import files
from tests.hostile.case import (
    CHAT,
    EMBEDDINGS,
    QUESTION,
    Case,
    chat,
    chat_prompt,
    data_url,
    drawn,
    encoded,
    image_part,
)


def showing(name: str, content: bytes, media_type: str, through_chat: bool) -> Case:
    """A request that shows a file, and may be answered rightly where it holds a picture."""
    picture = files.read(content)
    part = image_part(data_url(content, media_type))
    verdict = "refused" if picture is None else "either"
    shown = None if picture is None else (picture,)
    if not through_chat:
        return Case(name, EMBEDDINGS, {"input": [part]}, verdict, shown)
    body = chat([part, {"type": "text", "text": QUESTION}], return_mm_embedding=True)
    return Case(name, CHAT, body, verdict, shown, chat_prompt(QUESTION, 1))


def file_cases(seed: str) -> Iterator[Case]:
    """Files of every kind, every third in a chat and the others to be embedded alone."""
    everything = itertools.chain(
        files.written(seed),
        files.turned(seed),
        files.animated(seed),
        files.cut(seed, 16),
        files.damaged(seed, 32),
        files.noise(seed, 4),
        files.polyglots(seed),
        files.lying(seed),
        files.bombs(),
        files.shapes(seed),
    )
    for number, (name, kind, content) in enumerate(everything):
        media_type = files.MEDIA_TYPES.get(kind, "application/octet-stream")
        yield showing(name, content, media_type, through_chat=number % 3 == 0)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9"/></svg>'
PROGRAM = b"\x7fELF" + bytes(60)

NO_PICTURES = {
    "SVG": (SVG, "image/svg+xml"),
    "a page": (b"<!doctype html><p>hello</p>", "text/html"),
    "a PDF": (b"%PDF-1.7\n%%EOF", "application/pdf"),
    "a program": (PROGRAM, "image/png"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "image/eps"),
    "an archive": (b"PK\x05\x06" + bytes(18), "application/zip"),
    "a pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94.", "image/png"),
    "zeros": (bytes(5000), "image/png"),
    "nothing": (b"", "image/png"),
}


def media_type_cases(seed: str) -> Iterator[Case]:
    """Media types that are not the file's: its content decides."""
    for name, (content, media_type) in NO_PICTURES.items():
        yield showing(f"{name} for a picture", content, media_type, through_chat=True)
    wrong = ("image/jpeg", "image/gif", "text/html", "video/mp4", "audio/wav", "x", "", "image/")
    for media_type in (*wrong, "image/png;charset=utf-8", "image/png;a=b;c=d", "IMAGE/PNG"):
        content = encoded(drawn(f"{seed}-{media_type}"))
        yield showing(f"a PNG called {media_type!r}", content, media_type, through_chat=False)


def base64_cases(seed: str) -> Iterator[Case]:
    """Text that is not quite base64, and URLs that are not quite data."""
    clean = base64.b64encode(encoded(drawn(seed))).decode()
    garbage = {
        "spaces": clean[:40] + "    " + clean[40:],
        "line breaks": "\n".join(clean[at : at + 60] for at in range(0, len(clean), 60)),
        "another alphabet": clean.replace("+", "-").replace("/", "_") + "-_",
        "no padding": clean[: len(clean) // 8 * 4 + 2],
        "padding in the middle": clean[:40] + "==" + clean[40:],
        "too much padding": clean + "====",
        "percent signs": clean.replace("=", "%3D") + "%",
        "other letters": clean[:50] + "ß漢🙂" + clean[50:],
        "a NUL": clean[:50] + "\0" + clean[50:],
        "twice": clean + "," + clean,
        "a quote": f'"{clean}"',
        "only padding": "====",
        "one letter": "A",
        "a megabyte of letters": "A" * (1 << 20),
        "nothing": "",
    }
    for name, text in garbage.items():
        part = image_part(f"data:image/png;base64,{text}")
        yield Case(f"base64 with {name}", EMBEDDINGS, {"input": [part]}, "refused")
    urls = {
        "no comma": f"data:image/png;base64;{clean}",
        "no encoding": f"data:image/png,{clean}",
        "another encoding": f"data:image/png;base32,{clean}",
        "capitals": f"DATA:image/png;base64,{clean}",
        "BASE64": f"data:image/png;BASE64,{clean}",
        "no type": f"data:;base64,{clean}",
        "nothing else": "data:",
        "only a comma": "data:,",
        "a text": "data:,hello",
        "a space before": f" data:image/png;base64,{clean}",
        "slashes": f"data://image/png;base64,{clean}",
        "a long type": f"data:{'x' * 9000};base64,{clean}",
        "many parameters": f"data:image/png{';a=b' * 3000};base64,{clean}",
        "other letters": f"data:immagine/漢字;base64,{clean}",
    }
    for name, url in urls.items():
        pictures = (drawn(seed),)  # where it is answered at all
        yield Case(
            f"a data URL with {name}", EMBEDDINGS, {"input": [image_part(url)]}, "either", pictures
        )

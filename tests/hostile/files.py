# SPDX-License-Identifier: Apache-2.0
"""Files of pictures, whole and broken, and a second reading of them to compare with."""

import io
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageOps

from tests.hostile.case import drawn, encoded

MEDIA_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "GIF": "image/gif",
    "WEBP": "image/webp",
    "TIFF": "image/tiff",
    "BMP": "image/bmp",
    "JPEG2000": "image/jp2",
    "AVIF": "image/avif",
}
"""What the web shows, and a few more."""

RARE = ("TGA", "PCX", "SGI", "DDS", "ICO", "ICNS", "IM", "PPM", "QOI", "XBM", "MSP", "SPIDER")

REFUSED_FORMATS = ("EPS", "PDF", "PALM")
"""Pillow writes them; EPS is read by Ghostscript, the others not at all."""

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")


def read(content: bytes) -> Image.Image | None:
    """The picture in a file: first frame, turned as its EXIF says, alpha over white, RGB.

    Pillow decodes here too; what is done with the decoded pixels is written down a second time.

    Returns:
        None where there is no picture.
    """
    try:
        with Image.open(io.BytesIO(content)) as file:
            file.load()
            try:
                turned: Any = ImageOps.exif_transpose(file)
            except Exception:  # EXIF that cannot be read turns nothing
                turned = file
            if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
                over = turned.convert("RGBA")
                white = Image.new("RGBA", over.size, "white")
                return Image.alpha_composite(white, over).convert("RGB")
            return turned.convert("RGB")
    except Exception:  # whatever a decoder raises for damaged files
        return None


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The picture with other channels."""
    if mode in ("LAB", "HSV", "YCbCr", "CMYK"):
        return Image.merge(mode, list((image.convert("CMYK") if mode == "CMYK" else image).split()))
    if mode in ("RGBA", "LA", "PA"):
        alpha = Image.linear_gradient("L").resize(image.size)
        plain = image.convert({"RGBA": "RGB", "LA": "L", "PA": "P"}[mode])
        if mode == "PA":
            both = plain.convert("PA")
            both.putalpha(alpha)
            return both
        return Image.merge(mode, [*plain.split(), alpha])
    if mode in ("I", "I;16", "F"):
        return image.convert("L").convert("I").convert(mode)
    return image.convert(mode)


def written(seed: str) -> Iterator[tuple[str, str, bytes]]:
    """Name, format and content of each mode in each format that has it."""
    for mode in MODES:
        for kind in (*MEDIA_TYPES, *RARE, *REFUSED_FORMATS):
            try:
                content = encoded(in_mode(drawn(f"{seed}-{mode}-{kind}"), mode), kind)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # this format has no such mode
            yield f"{mode} as {kind}", kind, content


def turned(seed: str) -> Iterator[tuple[str, str, bytes]]:
    """Each EXIF orientation, and ones that there are not, in each format that has EXIF."""
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        for orientation in (*range(1, 9), 0, 9, 65535):
            image = drawn(f"{seed}-{kind}-{orientation}", (48, 30))
            exif = Image.Exif()
            exif[0x0112] = orientation
            yield f"orientation {orientation} as {kind}", kind, encoded(image, kind, exif=exif)
        for number, broken in enumerate(
            (b"", b"Exif\0\0", b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" * 99)
        ):
            image = drawn(f"{seed}-{kind}-broken-{number}", (48, 30))
            try:
                content = encoded(image, kind, exif=broken)
            except Exception:  # Pillow reads it to write it
                continue
            yield f"broken EXIF {number} as {kind}", kind, content


def animated(seed: str) -> Iterator[tuple[str, str, bytes]]:
    """Files of several frames."""
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        for count in (2, 7):
            first, *others = (drawn(f"{seed}-{kind}-{index}", (40, 30)) for index in range(count))
            content = encoded(first, kind, save_all=True, append_images=others)
            yield f"{count} frames as {kind}", kind, content


def cut(seed: str, parts: int) -> Iterator[tuple[str, str, bytes]]:
    """Files that end early."""
    for kind in MEDIA_TYPES:
        content = encoded(drawn(f"{seed}-{kind}", (64, 48)), kind)
        for part in range(parts):
            yield f"{part}/{parts} of a {kind}", kind, content[: len(content) * part // parts]
        yield f"a {kind} without its last byte", kind, content[:-1]


def damaged(seed: str, times: int) -> Iterator[tuple[str, str, bytes]]:
    """Files some of whose bytes are others, at random places or among the first hundred."""
    for kind in (*MEDIA_TYPES, "TGA", "ICO", "QOI", "DDS"):
        for number in range(times):
            rng = random.Random(f"{seed}-{kind}-{number}")
            content = bytearray(encoded(drawn(f"{seed}-{kind}-{number}"), kind))
            reach = min(100, len(content)) if number % 2 else len(content)
            for _ in range(rng.choice((1, 2, 5, 20))):
                content[rng.randrange(reach)] = rng.randrange(256)
            yield f"{kind} damaged {number}", kind, bytes(content)


def noise(seed: str, times: int) -> Iterator[tuple[str, str, bytes]]:
    """A format's first bytes, and then nothing that makes sense."""
    for kind in (*MEDIA_TYPES, *RARE):
        mode = "1" if kind in ("XBM", "MSP") else "RGB"
        head = encoded(drawn(seed).convert(mode), kind)[:24]
        for number in range(times):
            rng = random.Random(f"{seed}-noise-{kind}-{number}")
            yield f"{kind} of noise {number}", kind, head[: rng.randint(2, 24)] + rng.randbytes(300)


def polyglots(seed: str) -> Iterator[tuple[str, str, bytes]]:
    """Files that are something else too."""
    page = b"<html><script>alert(1)</script></html>"
    archive = b"PK\x03\x04" + bytes(26) + b"PK\x05\x06" + bytes(18)
    for kind in MEDIA_TYPES:
        content = encoded(drawn(f"{seed}-{kind}"), kind)
        other = encoded(drawn(f"{seed}-{kind}-other"), "JPEG" if kind == "PNG" else "PNG")
        yield f"a {kind} and a page", kind, content + page
        yield f"a {kind} and an archive", kind, content + archive
        yield f"a {kind} and another picture", kind, content + other
        yield f"a page and a {kind}", kind, page + content
        yield f"a PDF and a {kind}", kind, b"%PDF-1.7\n" + content
        yield f"a byte order mark and a {kind}", kind, b"\xef\xbb\xbf" + content
    text = b"GIF89a/*" + bytes(20) + b"*/=1;alert(1)//"
    yield "a script that begins like a GIF", "GIF", text
    commented = encoded(drawn(f"{seed}-comment"), "JPEG", comment=page + archive)
    yield "a JPEG with a page for a comment", "JPEG", commented


# -- sizes ----------------------------------------------------------------------------------------


def png_of(width: int, height: int, rows: bytes = b"", depth: int = 1) -> bytes:
    """A PNG that says it has this size, whatever it holds."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    data = zlib.compress(rows, 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def _patched(content: bytes, at: int, layout: str, *values: int) -> bytes:
    packed = struct.pack(layout, *values)
    return content[:at] + packed + content[at + len(packed) :]


def lying(seed: str) -> Iterator[tuple[str, str, bytes]]:
    """Files that say they are empty, negative or enormous."""
    sizes = ((0, 0), (0, 10), (10, 0), (2**31 - 1, 1), (1, 2**31 - 1), (2**31, 2**31))
    sizes += ((2**32 - 1, 2**32 - 1), (20000, 20000), (100000, 100000))
    for width, height in sizes:
        yield f"a PNG that says {width}x{height}", "PNG", png_of(width, height, bytes(100))
    image = drawn(seed)
    bmp, gif, jpeg = (encoded(image, kind) for kind in ("BMP", "GIF", "JPEG"))
    for width, height in ((0, 9), (9, 0), (-9, 9), (9, -9), (2**31 - 1, 9), (30000, -30000)):
        content = _patched(bmp, 18, "<ii", width, height)
        yield f"a BMP that says {width}x{height}", "BMP", content
    for width, height in ((0, 0), (0, 9), (9, 0), (65535, 65535)):
        yield f"a GIF that says {width}x{height}", "GIF", _patched(gif, 6, "<HH", width, height)
        at = jpeg.index(b"\xff\xc0") + 5
        content = _patched(jpeg, at, ">HH", height, width)
        yield f"a JPEG that says {width}x{height}", "JPEG", content


def bombs() -> Iterator[tuple[str, str, bytes]]:
    """Few bytes that unpack to more pixels than Pillow allows."""
    for side in (14000, 20000, 40000):
        yield f"a PNG of {side}x{side}", "PNG", png_of(side, side, bytes(side * (side // 8 + 1)))
    yield "a GIF of 15000x15000", "GIF", encoded(Image.new("P", (15000, 15000)), "GIF")
    flat = Image.new("1", (30000, 30000))
    yield "a TIFF of 30000x30000", "TIFF", encoded(flat, "TIFF", compression="group4")
    text = b"zTXt" + b"bomb\0\0" + zlib.compress(bytes(1 << 27), 9)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    whole = encoded(drawn("text bomb"))
    yield "a PNG with 128 MiB of text", "PNG", whole[:33] + chunk + whole[33:]


def shapes(seed: str) -> Iterator[tuple[str, str, bytes]]:
    """Sizes that nobody photographs."""
    for width, height in ((1, 1), (1, 2), (2, 1), (1, 900), (900, 1), (3, 700), (5000, 3), (7, 7)):
        image = drawn(f"{seed}-{width}", (64, 64)).resize((width, height))
        yield f"{width}x{height}", "PNG", encoded(image)

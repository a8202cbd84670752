# SPDX-License-Identifier: Apache-2.0
"""Media that cannot be used are the client's error, whatever the libraries raise for them.

vLLM answers HTTP 400 where ``load_bytes`` raises ValueError, and HTTP 500 or 501 for most others.
"""

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
from vllm.multimodal.media import image as vllm_image
from vllm.multimodal.media.connector import MediaConnector
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.parse import MultiModalDataParser

from vllm_spyre_mm.upstream.contract import UnsupportedVllmError
from vllm_spyre_mm.vllm_fixes import media, media_connector
from vllm_spyre_mm.vllm_fixes.array_pictures import prepare_pictures
from vllm_spyre_mm.vllm_fixes.media_connector import CheckedMediaConnector, checked

SIGNATURE_LENGTH = 8  # of a PNG file


@pytest.fixture(autouse=True)
def installed() -> None:
    """As the platform's entry point does it; more than once is harmless."""
    media.install()


def saved(image_format: str, mode: str = "RGB") -> bytes:
    """Noise, so that its pixels take many bytes in every format."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, image_format)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bomb() -> bytes:
    """A hundred bytes that say they are 3.6 gigapixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return saved("PNG")[:SIGNATURE_LENGTH] + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def truncated() -> bytes:
    """The first half of a picture, as a broken connection leaves it."""
    whole = saved("PNG")
    return whole[: len(whole) // 2]


def broken_chunk() -> bytes:
    """A picture whose pixels end, by their header, in the middle of themselves."""
    file = bytearray(saved("PNG"))
    start = file.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", file, start)
    struct.pack_into(">I", file, start, length // 2)
    return bytes(file)


def unknown_pixel_format() -> bytes:
    """A texture with none of the flags that say how its pixels are laid out."""
    file = bytearray(saved("DDS"))
    struct.pack_into("<I", file, 80, 0)
    return bytes(file)


def load(data: bytes) -> Any:
    return checked(ImageMediaIO()).load_bytes(data)


def load_without_hook(data: bytes) -> Any:
    return ImageMediaIO().load_bytes(data)


# -- pictures that pass ----------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "GIF", "TIFF"])
def test_a_good_picture_is_what_vllm_makes_of_it(image_format: str):
    data = saved(image_format)
    loaded, expected = load(data), load_without_hook(data)
    assert loaded.media.mode == "RGB"
    assert loaded.media.size == (40, 30)
    assert loaded.media.tobytes() == expected.media.tobytes()
    assert loaded.original_bytes == data


def test_the_mode_that_is_asked_for_is_kept():
    loaded = checked(ImageMediaIO(image_mode="L")).load_bytes(saved("PNG", "RGBA"))
    assert loaded.media.mode == "L"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("options", [{}, {"rgba_background_color": [9, 8, 7]}, {"image_mode": "L"}])
def test_a_good_picture_has_the_key_in_the_caches_that_vllm_gives_it(
    mode: str, options: dict[str, Any]
):
    data = saved("PNG", mode)
    loaded = checked(ImageMediaIO(**options)).load_bytes(data)
    expected = ImageMediaIO(**options).load_bytes(data)
    assert loaded.io_config == expected.io_config
    assert loaded.media.tobytes() == expected.media.tobytes()


Raised = type[Exception] | tuple[type[Exception], ...]

BROKEN = (SyntaxError, ValueError)
"""What Pillow raises for a broken file, and what later releases of vLLM make of that themselves."""


# -- pictures that Pillow refuses ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "without_hook", "sentence"),
    [
        (bomb, Image.DecompressionBombError, "3600000000 pixels"),
        (broken_chunk, BROKEN, "broken PNG file"),
        (unknown_pixel_format, NotImplementedError, "Unknown pixel format"),
    ],
)
def test_what_vllm_would_call_its_own_error_is_the_clients(
    make: Callable[[], bytes], without_hook: Raised, sentence: str
):
    data = make()
    with pytest.raises(without_hook):
        load_without_hook(data)
    with pytest.raises(ValueError, match=f"Failed to load image: .*{sentence}") as error:
        load(data)
    assert isinstance(error.value.__cause__, without_hook)


@pytest.mark.parametrize(
    "raised",
    [
        AttributeError,
        EOFError,
        Image.DecompressionBombError,
        KeyError,
        NotImplementedError,
        OverflowError,
        RuntimeError,
        BROKEN,
        TypeError,
        ZeroDivisionError,
        struct.error,
        zlib.error,
    ],
)
def test_whatever_a_decoder_raises_for_damage_is_the_clients_error(
    raised: Raised, monkeypatch: pytest.MonkeyPatch
):
    """Which of them a damaged file meets depends on the format and on Pillow's version."""

    def refuse(_: Any) -> Any:
        raise (raised[0] if isinstance(raised, tuple) else raised)("the decoder's words")

    monkeypatch.setattr(vllm_image, "open_image", refuse)
    monkeypatch.setattr(media_connector, "open_image", refuse)
    with pytest.raises(raised):
        load_without_hook(saved("PNG"))
    with pytest.raises(ValueError, match=r"Failed to load image: .*the decoder's words"):
        load(saved("PNG"))


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "BMP", "TIFF", "DDS", "BLP"])
def test_whatever_is_damaged_the_picture_loads_or_is_the_clients_error(image_format: str):
    whole = saved(image_format, "P" if image_format == "BLP" else "RGB")
    rng = random.Random(image_format)
    refused = 0
    for _ in range(200):
        file = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8))):
            file[rng.randrange(min(len(file), 200))] = rng.randrange(256)
        try:
            load(bytes(file[: rng.choice((len(file), rng.randrange(len(file))))]))
        except ValueError:
            refused += 1
    assert refused


@pytest.mark.parametrize("data", [truncated(), b"", b"no picture at all", b"GIF89a"])
def test_what_vllm_refuses_itself_stays_its_sentence(data: bytes):
    with pytest.raises(ValueError, match="Failed to load image") as expected:
        load_without_hook(data)
    with pytest.raises(ValueError, match="Failed to load image") as error:
        load(data)
    # Pillow's sentence for bytes of no format has the address of the buffer.
    assert str(error.value).partition(" at 0x")[0] == str(expected.value).partition(" at 0x")[0]


def test_vllms_own_limit_of_pixels_still_speaks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "100")
    for of in (load, load_without_hook):
        with pytest.raises(ValueError, match=r"40x30 \(1200 pixels\) exceed"):
            of(saved("PNG"))


@pytest.mark.parametrize("raised", [MemoryError, KeyboardInterrupt])
def test_what_no_picture_is_to_blame_for_passes(
    raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
):
    def fail(_: Any) -> Any:
        raise raised

    monkeypatch.setattr(media_connector, "open_image", fail)
    with pytest.raises(raised):
        load(saved("PNG"))


# -- pictures that Pillow decodes in part ----------------------------------------------------------


def cut_short(image_format: str) -> bytes:
    whole = saved(image_format)
    return whole[: len(whole) // 2]


@pytest.mark.parametrize("image_format", ["JPEG2000", "WEBP", "JPEG", "PNG", "GIF", "TIFF"])
def test_a_picture_that_ends_early_is_refused_and_not_black(image_format: str):
    with pytest.raises(ValueError, match="Failed to load image"):
        load(cut_short(image_format))


def test_vllm_alone_would_serve_it():
    """It suppresses what the decoder says; when it does not any more, the hook can go."""
    assert load_without_hook(cut_short("JPEG2000")).media.size == (40, 30)


def test_a_picture_of_pillows_that_ends_early_is_refused(tmp_path: Path):
    """``LLM.generate`` takes pictures that nothing was read of yet."""
    file = tmp_path / "picture.jp2"
    file.write_bytes(cut_short("JPEG2000"))
    with pytest.raises(ValueError, match="Failed to load image"):
        prepare_pictures([Image.open(file)])


def test_exif_that_cannot_be_read_turns_nothing():
    image = Image.open(io.BytesIO(saved("PNG")))
    file = io.BytesIO()
    image.save(file, "PNG", exif=b"Exif\0\0MM")
    assert load(file.getvalue()).media.tobytes() == image.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation: int):
    """From a file, from bytes and in Python alike."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.open(io.BytesIO(saved("PNG"))).save(file, "PNG", exif=exif)
    loaded = load(file.getvalue()).media
    prepared = prepare_pictures([Image.open(file)])
    (given,) = MultiModalDataParser().parse_mm_data({"image": prepared})["image"]
    expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    assert loaded.size == ((30, 40) if orientation > 4 else (40, 30))
    assert loaded.tobytes() == given.tobytes() == expected.tobytes()


# -- installing ------------------------------------------------------------------------------------


def test_vllm_makes_the_platforms_connector():
    media.install()  # harmless
    assert type(MEDIA_CONNECTOR_REGISTRY.load("http")) is CheckedMediaConnector


def test_a_connector_of_another_plugin_stays(monkeypatch: pytest.MonkeyPatch):
    class Another(MediaConnector):
        """Somebody else's."""

    monkeypatch.setitem(MEDIA_CONNECTOR_REGISTRY.name2class, "http", Another)
    media.install()
    assert type(MEDIA_CONNECTOR_REGISTRY.load("http")) is Another


def test_a_picture_is_checked_once():
    once = checked(ImageMediaIO())
    assert checked(once) is once


def test_a_connector_that_is_not_as_expected_is_refused_before_it_is_replaced():
    module: Any = ModuleType("vllm.multimodal.media.connector")
    with pytest.raises(UnsupportedVllmError, match="no 'MEDIA_CONNECTOR_REGISTRY'"):
        media._register_connector(module)

    class Connector(MediaConnector):
        def load_from_url(self, address: str) -> None:  # type: ignore[override]
            """A vLLM that calls its parameter otherwise."""

    registry = SimpleNamespace(name2class={"http": Connector})
    module.MediaConnector, module.MEDIA_CONNECTOR_REGISTRY = Connector, registry
    with pytest.raises(UnsupportedVllmError, match=r"no parameter '(connection|url)'"):
        media._register_connector(module)
    assert registry.name2class == {"http": Connector}

# SPDX-License-Identifier: Apache-2.0
"""Serialized image embeddings that are none."""

import base64
import io
import itertools
import pickle
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tests.hostile.case import CHAT, EMBEDDINGS, QUESTION, Case, chat

HIDDEN_SIZE = 256
"""Of the demo checkpoint's decoder."""


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def array(value: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, **options)
    return buffer.getvalue()


def npy_of(shape: str, dtype: str, content: bytes = b"") -> bytes:
    """An ``.npy`` file with this header, whatever it holds."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def strided(*sizes: int) -> torch.Tensor:
    """A tensor that says it is large and holds one element."""
    return torch.zeros(1).expand(*sizes)


class Dangerous:
    """What a pickle may do when it is read; not this one, and not here."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("1 / 0",)


def good(rows: int = 9, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _with_value(value: float) -> torch.Tensor:
    embedding = good()
    embedding[3, 5] = value
    return embedding


SHAPES = (
    (), (0,), (1,), (HIDDEN_SIZE,), (0, 0), (0, HIDDEN_SIZE), (9, 0), (9, 1), (9, HIDDEN_SIZE - 1),
    (9, HIDDEN_SIZE + 1), (HIDDEN_SIZE, 9), (2, 9, HIDDEN_SIZE), (1, 1, 9, HIDDEN_SIZE),
    (1, 1, 1, 1, 1, 1, 1, 1), (3, 24, 24), (2000, HIDDEN_SIZE),
)  # fmt: skip
"""None of them fits; the last has more rows than the model's length."""

DTYPES = (
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def tensors() -> Iterator[tuple[str, object]]:
    """Name and value of what is no embedding, to be saved by PyTorch."""
    for shape in SHAPES:
        yield f"an embedding of shape {shape}", torch.ones(shape)
    for dtype in DTYPES:
        yield f"an embedding of {dtype}", torch.ones(9, HIDDEN_SIZE).to(dtype)
    for value in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            yield f"an embedding with {value} as {dtype}", _with_value(value).to(dtype)
    for sizes in ((10**6, HIDDEN_SIZE), (10**9, 10**6)):
        yield f"one element that says it is {sizes}", strided(*sizes)
    place, ones = torch.tensor([[10**6], [0]]), torch.ones(1)
    large = torch.sparse_coo_tensor(place, ones, (10**9, HIDDEN_SIZE), check_invariants=False)
    yield "a tensor of zeros that says it is large", large
    yield "an embedding of nothing", torch.empty(9, HIDDEN_SIZE, device="meta")
    yield "a list", [1, 2]
    yield "a dict", {"image_embeds": good()}
    yield "a string", "x"
    yield "None", None
    yield "a tuple of embeddings", (good(), good())
    yield "a parameter of another width", torch.nn.Parameter(good()[:, :5])
    yield "a call", Dangerous()


def arrays() -> Iterator[tuple[str, bytes]]:
    """The same for NumPy, as files."""
    for shape in SHAPES:
        yield f"an array of shape {shape}", array(np.ones(shape, np.float32))
    for name, dtype in {"text": "<U5", "bytes": "S5", "dates": "M8[s]", "records": "i4,f4"}.items():
        yield f"an array of {name}", array(np.zeros((9, HIDDEN_SIZE), dtype))
    objects = np.array([[{}] * 3], dtype=object)
    yield "an array of objects", array(objects, allow_pickle=True)
    for shape in ((10**12,), (10**9, 10**6), (-1, HIDDEN_SIZE), (9, -HIDDEN_SIZE), (2**70,), "x"):
        yield f"an array that says it is {shape}", npy_of(repr(shape), "'<f4'")
    yield "an array that says nothing", npy_of("()", "'<f4'")
    yield "an array with a long header", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{"
    yield "an array of another version", b"\x93NUMPY\x09\x00" + bytes(100)
    yield "an array with code in its header", npy_of("(9,)", "__import__('os').getpid()")


def damage() -> Iterator[tuple[str, bytes]]:
    """Files that are not whole, and ones that never were."""
    yield "a pickle that runs code", pickle.dumps(Dangerous())
    yield "a pickle of an array", pickle.dumps(np.ones((9, HIDDEN_SIZE), np.float32))
    whole, other = saved(good()), array(good().numpy())
    for part in range(12):
        yield f"{part}/12 of an embedding", whole[: len(whole) * part // 12]
        yield f"{part}/12 of an array", other[: len(other) * part // 12]
    for number in range(20):
        rng = np.random.default_rng(number)
        yield f"noise for an embedding {number}", rng.bytes(int(rng.integers(1, 400)))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(50 << 20))
        file.writestr("archive/version", "3\n")
    yield "an archive that unpacks to 50 MiB", archive.getvalue()


def flipped() -> Iterator[tuple[str, bytes]]:
    """Files that may be embeddings: damage may hit nothing of importance."""
    whole = saved(good())
    for number in range(60):
        damaged = bytearray(whole)
        rng = np.random.default_rng(number)
        for at in rng.integers(0, 900, 4):
            damaged[at] = int(rng.integers(256))
        yield f"an embedding damaged {number}", bytes(damaged)
    yield "a sparse embedding", saved(good().to_sparse())


def embedding_part(content: Any) -> dict[str, Any]:
    return {"type": "image_embeds", "image_embeds": content}


def odd_values(clean: str) -> dict[str, Any]:
    """Values of the field, given a good one."""
    return {
        "no base64": "%%%",
        "nothing": "",
        "half of it": clean[:1001],
        "a URL": f"data:,{clean}",
        "a number": 5,
        "a list": [clean],
        "nested numbers": good()[:2].tolist(),
        "true": True,
        "a dict of it": {"image_embeds": clean},
        "an empty dict": {},
        "a dict of numbers": {"a": 1},
        "another key": {"pixel_values": clean},
        "two keys": {"image_embeds": clean, "image_sizes": clean},
        "None": None,
        "a dict of None": {"image_embeds": None},
        "a deep dict": {"a": {"b": clean}},
    }


def embedding_cases() -> Iterator[Case]:
    """Every other one in a chat, the others to be embedded alone."""
    broken = [(name, saved(value)) for name, value in tensors()]
    refused: tuple[Any, Any] = (itertools.chain(broken, arrays(), damage()), "refused")
    for files, verdict in (refused, (flipped(), "either")):
        for number, (name, content) in enumerate(files):
            part = embedding_part(base64.b64encode(content).decode())
            if number % 2:
                yield Case(name, EMBEDDINGS, {"input": [part]}, verdict)
            else:
                yield Case(name, CHAT, chat([part, {"type": "text", "text": QUESTION}]), verdict)
    clean = base64.b64encode(saved(good())).decode()
    for name, value in odd_values(clean).items():
        content = [embedding_part(value), {"type": "text", "text": QUESTION}]
        yield Case(f"{name} for an embedding", CHAT, chat(content), "refused")
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        part = embedding_part(base64.b64encode(saved(good(9, 1, dtype))).decode())
        yield Case(f"a good embedding of {dtype}", EMBEDDINGS, {"input": [part]}, "answered")

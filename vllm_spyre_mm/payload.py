# SPDX-License-Identifier: Apache-2.0
"""An embedding as JSON: what HTTP responses carry, and how a client reads it."""

import base64
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec
import torch

from vllm_spyre_mm.multimodal.embedding import MMEmbeddingInfo
from vllm_spyre_mm.multimodal.feature_check import dtype_name

EncodingFormat = Literal["base64", "float"]

DTYPES = {
    name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64", "int8")
}
"""Those that an embedding may have, by the names of a response."""

PIECE_ELEMENTS = 2048
"""Elements that are written as text at a time: 2 or 3 ms."""

PIECE_BYTES = 3 << 16
"""Bytes that are written as base64 at a time, a multiple of 3: less than 1 ms."""


def encode_mm_embedding(
    embedding: torch.Tensor, info: MMEmbeddingInfo, encoding_format: EncodingFormat
) -> dict[str, Any]:
    """An embedding as a JSON object.

    Args:
        embedding: ``(rows, hidden_size)``, on the CPU.
        info: which rows are which.
        encoding_format: ``base64`` of the little-endian elements row by row, or ``float`` for
            nested lists of numbers.

    Returns:
        ``shape``, ``dtype``, ``encoding_format``, ``data``, ``pooling``, ``levels``, ``items``, and
        ``scales`` where the dtype is int8.
    """
    payload = _description(embedding, info, encoding_format)
    payload["data"] = _encode(embedding, encoding_format)
    if info.scales is not None:
        payload["scales"] = _encode(info.scales, encoding_format)
    return payload


def mm_embedding_text(
    embedding: torch.Tensor, info: MMEmbeddingInfo, encoding_format: EncodingFormat
) -> Iterator[bytes]:
    """The JSON of :func:`encode_mm_embedding` in pieces, each of which takes a few milliseconds.

    It copies no more than a piece, on a host whose numbers are little-endian. Args: as there.
    """
    fields = json.dumps(_description(embedding, info, encoding_format), separators=(",", ":"))
    yield fields.removesuffix("}").encode() + b',"data":'
    yield from _text(embedding, encoding_format)
    if info.scales is not None:
        yield b',"scales":'
        yield from _text(info.scales, encoding_format)
    yield b"}"


def _description(
    embedding: torch.Tensor, info: MMEmbeddingInfo, encoding_format: EncodingFormat
) -> dict[str, Any]:
    """The fields that do not grow with the embedding."""
    return {
        "shape": list(embedding.shape),
        "dtype": dtype_name(embedding.dtype),
        "encoding_format": encoding_format,
        "pooling": info.pooling,
        "levels": info.levels,
        "items": msgspec.to_builtins(info.items),
    }


def decode_mm_embedding(payload: Mapping[str, Any]) -> torch.Tensor:
    """The embedding of an HTTP response.

    Args:
        payload: ``choice.mm_embedding`` as the client parsed it from JSON.

    Returns:
        ``(rows, hidden_size)`` in the dtype that was sent; int8 rows come as float32, multiplied
        by their scales.

    Raises:
        ValueError: it is no such payload, or not whole.
    """
    try:
        encoding, shape = payload["encoding_format"], payload["shape"]
        rows = _decode(payload["data"], encoding, DTYPES[payload["dtype"]]).view(shape)
        if list(rows.shape) != list(shape) or rows.ndim != 2:
            raise ValueError(f"its data has the shape {list(rows.shape)}")
        if "scales" not in payload:
            return rows
        scales = _decode(payload["scales"], encoding, torch.float32)
        depths = rows.float().unflatten(1, (scales.numel() // len(rows), -1))
        return (depths * scales.view(*depths.shape[:2], 1)).flatten(1)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"this is no mm_embedding of a response: {error!r}") from error


def _encode(tensor: torch.Tensor, encoding_format: EncodingFormat) -> Any:
    if encoding_format == "float":
        return tensor.tolist()
    return base64.b64encode(_little_endian(tensor.contiguous()).numpy().tobytes()).decode()


def _little_endian(elements: torch.Tensor) -> torch.Tensor:
    """The bytes of contiguous elements, turned over on a host that has them the other way round.

    Bytes of a payload become elements of the host in the same way.
    """
    octets = elements.flatten().view(torch.uint8)
    if sys.byteorder == "little":
        return octets
    return octets.view(-1, elements.element_size()).flip(1).flatten()


def _text(tensor: torch.Tensor, encoding_format: EncodingFormat) -> Iterator[bytes]:
    """What :func:`_encode` gives, as JSON in pieces."""
    if encoding_format == "float":
        yield from _nested_text(tensor)
        return
    octets = _little_endian(tensor.contiguous())
    yield b'"'
    for part in octets.split(PIECE_BYTES):
        yield base64.b64encode(part.numpy().tobytes())
    yield b'"'


def _nested_text(tensor: torch.Tensor) -> Iterator[bytes]:
    if tensor.ndim > 1:
        yield b"["
        for index, row in enumerate(tensor):
            yield from _nested_text(row) if index == 0 else _after(b",", _nested_text(row))
        yield b"]"
        return
    parts = tensor.split(PIECE_ELEMENTS)
    for index, part in enumerate(parts):
        numbers = json.dumps(part.tolist(), separators=(",", ":"), allow_nan=False)[1:-1]
        begin, end = "[" if index == 0 else ",", "]" if index == len(parts) - 1 else ""
        yield f"{begin}{numbers}{end}".encode()


def _after(first: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """``pieces``, the first one longer."""
    yield first + next(pieces)
    yield from pieces


def _decode(data: Any, encoding_format: str, dtype: torch.dtype) -> torch.Tensor:
    if encoding_format == "float":
        return torch.tensor(data, dtype=dtype)
    if encoding_format != "base64":
        raise ValueError(f"there is no encoding_format {encoding_format!r}")
    elements = torch.frombuffer(bytearray(base64.b64decode(data, validate=True)), dtype=dtype)
    return _little_endian(elements).view(dtype)

# SPDX-License-Identifier: Apache-2.0
"""An embedding goes to JSON and back; what is no such JSON is refused."""

import contextlib
import json
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_spyre_mm import payload as payloads
from vllm_spyre_mm.multimodal.embedding import MMEmbeddingInfo
from vllm_spyre_mm.multimodal.pooling import convert
from vllm_spyre_mm.payload import decode_mm_embedding, encode_mm_embedding, mm_embedding_text

ENCODINGS: Any = st.sampled_from(["base64", "float"])
DTYPES = ("auto", "float32", "float16", "bfloat16", "int8")


def payload_of(rows: torch.Tensor, dtype: str, encoding: Any) -> tuple[torch.Tensor, Any]:
    """What is sent, and the JSON of it as a client parses it."""
    sent, scales = convert(rows, dtype)
    info = MMEmbeddingInfo([], "raw", scales)
    payload = json.loads(json.dumps(encode_mm_embedding(sent, info, encoding)))
    return sent if scales is None else sent.float() * scales.unsqueeze(1), payload


@st.composite
def rows(draw: st.DrawFn) -> torch.Tensor:
    """Of any finite size that float16 holds."""
    count, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    numbers = st.floats(-65504, 65504, width=32)
    elements = draw(st.lists(numbers, min_size=count * width, max_size=count * width))
    return torch.tensor(elements).view(count, width)


@given(rows(), st.sampled_from(DTYPES), ENCODINGS)
def test_there_and_back(embedding: torch.Tensor, dtype: str, encoding: Any):
    sent, payload = payload_of(embedding, dtype, encoding)
    decoded = decode_mm_embedding(payload)
    assert decoded.dtype == sent.dtype
    assert torch.equal(decoded, sent)


@given(rows(), st.sampled_from(DTYPES), ENCODINGS, st.integers(1, 4))
def test_the_text_in_pieces_is_that_json(
    embedding: torch.Tensor, dtype: str, encoding: Any, size: int
):
    sent, scales = convert(embedding, dtype)
    info = MMEmbeddingInfo([], "raw", scales)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(payloads, "PIECE_ELEMENTS", size)
        patch.setattr(payloads, "PIECE_BYTES", 3 * size)
        pieces = list(mm_embedding_text(sent, info, encoding))
    assert json.loads(b"".join(pieces)) == encode_mm_embedding(sent, info, encoding)
    assert max(map(len, pieces[1:])) <= 25 * size + 3


@pytest.mark.parametrize("encoding", ["base64", "float"])
def test_a_piece_does_not_grow_with_the_embedding(encoding: Any):
    pieces = mm_embedding_text(torch.ones(300, 5000), MMEmbeddingInfo([], "raw"), encoding)
    assert max(map(len, pieces)) <= 300_000


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_big_endian_host_sends_and_reads_the_same(dtype: str, monkeypatch: pytest.MonkeyPatch):
    """Simulated: the bytes of each element lie in memory as such a host has them."""
    rows = torch.tensor([[1.0, -2.5], [0.125, 3.0]])
    sent, scales = convert(rows, dtype)
    info = MMEmbeddingInfo([], "raw", scales)
    here = encode_mm_embedding(sent, info, "base64")
    decoded_here = decode_mm_embedding(here)

    def turned_over(tensor: torch.Tensor) -> torch.Tensor:
        octets = tensor.contiguous().view(torch.uint8).view(-1, tensor.element_size())
        return octets.flip(1).contiguous().view(tensor.dtype).view(tensor.shape)

    monkeypatch.setattr(sys, "byteorder", "big")
    info = MMEmbeddingInfo([], "raw", None if scales is None else turned_over(scales))
    there = encode_mm_embedding(turned_over(sent), info, "base64")
    pieces = list(mm_embedding_text(turned_over(sent), info, "base64"))
    # What it reads lies in its memory in its order. (It multiplies int8 rows by what it has read.)
    decoded_there = decode_mm_embedding({key: here[key] for key in here if key != "scales"})
    monkeypatch.undo()
    assert there == here
    assert json.loads(b"".join(pieces)) == here
    decoded = turned_over(decoded_there)
    assert torch.equal(decoded, sent if dtype == "int8" else decoded_here)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("shape", "dtype", "encoding_format", "data", "scales")


@given(st.sampled_from(DTYPES), ENCODINGS, st.sampled_from(FIELDS), JSON | st.just(...))
def test_a_field_with_another_value_is_refused_or_means_the_same_shape(
    dtype: str, encoding: Any, field: str, value: Any
):
    """An ellipsis stands for a field that is left out."""
    _, payload = payload_of(torch.ones(2, 3), dtype, encoding)
    if value is ...:
        payload.pop(field, None)
    else:
        payload[field] = value
    with contextlib.suppress(ValueError):
        assert list(decode_mm_embedding(payload).shape) == list(payload["shape"])


@given(JSON)
def test_other_json_is_refused(value: Any):
    with pytest.raises(ValueError, match="this is no mm_embedding"):
        decode_mm_embedding(value)


@pytest.mark.parametrize("dtype", ["load", "int64", "Tensor", "float32 ", None])
def test_other_names_of_pytorch_are_no_dtypes(dtype: Any):
    _, payload = payload_of(torch.ones(2, 3), "float32", "float")
    with pytest.raises(ValueError, match="this is no mm_embedding"):
        decode_mm_embedding(payload | {"dtype": dtype})

# SPDX-License-Identifier: Apache-2.0
"""A serialized embedding is loaded as it is, or is the client's error."""

import asyncio
import base64
import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from vllm_spyre_mm.vllm_fixes import media
from vllm_spyre_mm.vllm_fixes.media_connector import CheckedEmbeddingMediaIO


def serialized(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_is_loaded_as_it_is(dtype: torch.dtype):
    embedding = torch.randn(5, 8).to(dtype)
    assert torch.equal(CheckedEmbeddingMediaIO().load_bytes(serialized(embedding)), embedding)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (torch.ones(3, 24, 24), "it has 3 dimensions, not 2"),
        (torch.ones(8), "it has 1 dimensions, not 2"),
        (torch.empty(5, 8, device="meta"), "not a plain tensor on the CPU"),
        (torch.ones(1).expand(10**6, 256), "fewer elements than its shape says"),
    ],
    ids=["pixels", "a vector", "no data", "one element"],
)
def test_what_is_no_embedding_is_refused(value: object, fault: str):
    with pytest.raises(ValueError, match=f"Failed to load an image embedding: .*{fault}"):
        CheckedEmbeddingMediaIO().load_bytes(serialized(value))


@pytest.mark.parametrize("value", [[1, 2], torch.ones(1).expand(10**9, 10**6)])
def test_what_vllm_refuses_of_embeddings_stays_its_sentence(value: object):
    with pytest.raises(VLLMValidationError, match="`image_embeds`"):
        CheckedEmbeddingMediaIO().load_bytes(serialized(value))


@settings(max_examples=200)
@given(st.binary(max_size=200) | st.binary(max_size=200).map(b"\x93NUMPY\x01\x00".__add__))
def test_no_bytes_are_more_than_the_clients_error(data: bytes):
    with pytest.raises((ValueError, VLLMValidationError)):
        CheckedEmbeddingMediaIO().load_bytes(data)


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_embedding_is_loaded_or_the_clients_error(data: st.DataObject):
    file = bytearray(serialized(torch.ones(5, 8)))
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError, VLLMValidationError):
        assert CheckedEmbeddingMediaIO().load_bytes(bytes(file)).ndim == 2


def test_an_array_that_says_it_is_enormous_is_the_clients_error():
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 10**7)}
    )
    with pytest.raises(ValueError, match="too large"):
        CheckedEmbeddingMediaIO().load_bytes(file.getvalue())


@pytest.mark.parametrize("later", [False, True], ids=["LLM", "server"])
def test_an_embedding_of_a_chat_is_checked(later: bool):
    media.install()
    connector = MEDIA_CONNECTOR_REGISTRY.load("http")

    def fetched(value: object) -> torch.Tensor:
        text = base64.b64encode(serialized(value)).decode()
        if later:
            return asyncio.run(connector.fetch_image_embedding_async(text))
        return connector.fetch_image_embedding(text)

    assert torch.equal(fetched(torch.ones(5, 8)), torch.ones(5, 8))
    with pytest.raises(ValueError, match="it has 3 dimensions, not 2"):
        fetched(torch.ones(3, 24, 24))

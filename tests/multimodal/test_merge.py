# SPDX-License-Identifier: Apache-2.0
"""Merging puts each feature row where a per-token loop would, in one static graph."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_spyre_mm.multimodal.merge import TEXT, FeatureSlice, merge_embeddings, plan_merge

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)
HIDDEN = 3


@st.composite
def placeholders(draw: st.DrawFn) -> tuple[int, list[MultiModalFeatureSpec]]:
    """A prompt's length and its images: any gaps, any mask, from none to four images."""
    features, position = [], 0
    for item in range(draw(st.integers(0, 4))):
        offset = position + draw(st.integers(0, 4))
        length = draw(st.integers(1, 12))
        mask = draw(st.none() | st.lists(st.booleans(), min_size=length, max_size=length))
        is_embed = None if mask is None else torch.tensor(mask, dtype=torch.bool)
        features.append(
            MultiModalFeatureSpec(
                data=None,
                modality="image",
                identifier=f"image {item}",
                mm_position=PlaceholderRange(offset, length, is_embed),
            )
        )
        position = offset + length
    return position + draw(st.integers(0, 5)) or 1, features


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[MultiModalFeatureSpec], int, int]:
    """Images and the bounds of one chunk of their prompt."""
    num_tokens, features = draw(placeholders())
    start = draw(st.integers(0, num_tokens))
    return features, start, draw(st.integers(start, num_tokens))


def naive_plan(
    features: list[MultiModalFeatureSpec], start: int, end: int
) -> dict[int, tuple[int, int]]:
    """For each position of a chunk that takes a feature: which image, and which of its rows."""
    plan = {}
    for item, feature in enumerate(features):
        position = feature.mm_position
        row = 0
        for i in range(position.length):
            if position.is_embed is not None and not position.is_embed[i]:
                continue
            if start <= position.offset + i < end:
                plan[position.offset + i] = (item, row)
            row += 1
    return plan


def rows_of(slices: list[FeatureSlice]) -> list[tuple[int, int]]:
    """Image and row of each row of the concatenated slices."""
    return [(part.item, row) for part in slices for row in range(part.start, part.end)]


# -- plan_merge -----------------------------------------------------------------------------------


@given(windows())
@PROPERTY
def test_a_plan_says_what_a_loop_over_the_tokens_says(
    window: tuple[list[MultiModalFeatureSpec], int, int],
):
    features, start, end = window
    slices, index = plan_merge(features, start, end)
    rows = rows_of(slices)
    planned = {start + i: rows[row] for i, row in enumerate(index.tolist()) if row != TEXT}
    assert index.shape == (end - start,)
    assert index.dtype == np.int64
    assert planned == naive_plan(features, start, end)
    # Nothing is gathered that no position takes, and empty slices are left out.
    assert len(planned) == len(rows)
    assert all(part.start < part.end for part in slices)


@given(placeholders(), st.data())
@PROPERTY
def test_chunks_of_a_plan_add_up_to_the_plan_of_the_whole_prompt(
    prompt: tuple[int, list[MultiModalFeatureSpec]], data: st.DataObject
):
    num_tokens, features = prompt
    cuts = data.draw(st.sets(st.integers(1, num_tokens), max_size=5))
    bounds = [0, *sorted(cuts | {num_tokens})]
    taken = []
    for start, end in itertools.pairwise(bounds):
        slices, index = plan_merge(features, start, end)
        rows = rows_of(slices)
        taken.extend(rows[row] if row != TEXT else None for row in index.tolist())
    slices, index = plan_merge(features, 0, num_tokens)
    rows = rows_of(slices)
    assert taken == [rows[row] if row != TEXT else None for row in index.tolist()]


def test_a_prompt_without_images_keeps_its_text():
    slices, index = plan_merge([], 3, 9)
    assert slices == []
    assert index.tolist() == [TEXT] * 6


# -- merge_embeddings -----------------------------------------------------------------------------


@st.composite
def merges(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text embeddings of one to four rows, features, and where the features go in each row."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    num_features = draw(st.integers(1, 7))
    row = st.lists(st.integers(TEXT, num_features - 1), min_size=length, max_size=length)
    index = draw(st.lists(row, min_size=batch, max_size=batch))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return (
        torch.randn(batch, length, HIDDEN, generator=generator).to(dtype),
        torch.randn(num_features, HIDDEN, generator=generator).to(dtype),
        torch.tensor(index),
    )


def naive_merge(
    text: torch.Tensor, features: torch.Tensor, feature_index: torch.Tensor
) -> torch.Tensor:
    merged = torch.empty_like(text)
    for row in range(text.shape[0]):
        for position in range(text.shape[1]):
            taken = int(feature_index[row, position])
            merged[row, position] = text[row, position] if taken == TEXT else features[taken]
    return merged


@given(merges())
@PROPERTY
def test_every_row_of_a_batch_is_merged_as_a_loop_would_and_nothing_is_written(
    merge: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
):
    before = [tensor.clone() for tensor in merge]
    merged = merge_embeddings(*merge)
    torch.testing.assert_close(merged, naive_merge(*merge), rtol=0, atol=0)
    assert all(torch.equal(now, then) for now, then in zip(merge, before, strict=True))
    assert merged.data_ptr() != merge[0].data_ptr()


@pytest.mark.parametrize("row", [0, 1, 2])
def test_an_image_in_one_row_leaves_the_other_rows_alone(row: int):
    text, features = torch.randn(3, 5, HIDDEN), torch.randn(2, HIDDEN)
    index = torch.full((3, 5), TEXT)
    index[row, 1:3] = torch.arange(2)
    merged = merge_embeddings(text, features, index)
    assert torch.equal(merged[row, 1:3], features)
    others = [other for other in range(3) if other != row]
    assert torch.equal(merged[others], text[others])


def test_several_rows_with_images_take_their_own_features():
    text, features = torch.randn(2, 4, HIDDEN), torch.randn(5, HIDDEN)
    index = torch.tensor([[TEXT, 0, 1, TEXT], [2, 3, TEXT, 4]])
    merged = merge_embeddings(text, features, index)
    assert torch.equal(merged[0, 1:3], features[:2])
    assert torch.equal(merged[1, [0, 1, 3]], features[2:])
    assert torch.equal(merged[0, [0, 3]], text[0, [0, 3]])


def test_text_alone_comes_back_unchanged():
    text = torch.randn(2, 4, HIDDEN)
    merged = merge_embeddings(text, torch.randn(1, HIDDEN), torch.full((2, 4), TEXT))
    assert torch.equal(merged, text)


def test_what_is_not_taken_does_not_leak_even_if_it_is_nan():
    """The bare embedding below an image, and feature rows that no position takes."""
    text, features = torch.randn(1, 4, HIDDEN), torch.randn(3, HIDDEN)
    index = torch.tensor([[TEXT, 1, 2, TEXT]])
    expected = merge_embeddings(text, features, index)
    text[0, 1:3] = float("nan")
    features[0] = float("nan")
    assert torch.equal(merge_embeddings(text, features, index), expected)


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_merge_is_one_graph_whatever_the_index_holds():
    """No shape depends on the data: other images at other places run the same graph."""
    counter = CompileCounter()
    compiled = torch.compile(merge_embeddings, fullgraph=True, backend=counter)
    text, features = torch.randn(2, 6, HIDDEN), torch.randn(4, HIDDEN)
    for index in (
        torch.full((2, 6), TEXT),
        torch.tensor([[TEXT, 0, 1, 2, 3, TEXT], [TEXT] * 6]),
        torch.tensor([[3, 3, 3, 3, 3, 3], [0, TEXT, 1, TEXT, 2, TEXT]]),
    ):
        expected = naive_merge(text, features, index)
        assert torch.equal(compiled(text, features, index), expected)
        eager = torch.compile(merge_embeddings, fullgraph=True, backend="eager")
        assert torch.equal(eager(text, features, index), expected)
    assert counter.frame_count == 1

# SPDX-License-Identifier: Apache-2.0
"""The encoder cache keeps whole images by identifier; what does not fit is refused."""

import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_spyre_mm.multimodal.encoder_cache import (
    EncoderCache,
    FeatureCountError,
    check_feature_count,
)
from vllm_spyre_mm.multimodal.merge import FeatureSlice


def image(
    identifier: str, length: int, is_embed: list[bool] | None = None
) -> MultiModalFeatureSpec:
    mask = None if is_embed is None else torch.tensor(is_embed)
    return MultiModalFeatureSpec(
        data=None,
        modality="image",
        identifier=identifier,
        mm_position=PlaceholderRange(offset=7, length=length, is_embed=mask),
    )


def test_an_image_is_found_again_by_its_identifier():
    cache = EncoderCache()
    features = torch.randn(5, 4)
    assert "a" not in cache
    cache.put(image("a", 5), features)
    assert "a" in cache
    assert len(cache) == 1
    assert cache.get(image("a", 5)) is features


def test_the_same_image_at_another_place_shares_the_entry():
    cache = EncoderCache()
    features = torch.randn(2, 4)
    cache.put(image("a", 2), features)
    elsewhere = image("a", 3, [True, False, True])
    assert cache.get(elsewhere) is features
    cache.put(elsewhere, features)
    assert len(cache) == 1


def test_eviction_forgets_the_named_images_and_ignores_unknown_ones():
    cache = EncoderCache()
    cache.put(image("a", 2), torch.randn(2, 4))
    cache.put(image("b", 3), torch.randn(3, 4))
    cache.evict(["a", "never encoded"])
    assert "a" not in cache
    assert "b" in cache


def test_an_evicted_entry_stays_whole_for_whoever_holds_it():
    cache = EncoderCache()
    features = torch.randn(2, 4)
    cache.put(image("a", 2), features)
    held, before = cache.get(image("a", 2)), features.clone()
    cache.evict(["a"])
    cache.put(image("a", 2), torch.zeros(2, 4))
    assert torch.equal(held, before)


def test_clear_forgets_everything():
    cache = EncoderCache()
    cache.put(image("a", 2), torch.randn(2, 4))
    cache.clear()
    assert len(cache) == 0
    assert cache.num_bytes == 0


def test_a_missing_image_is_named():
    with pytest.raises(KeyError, match="image 'lost' are not in the encoder cache"):
        EncoderCache().get(image("lost", 2))


@pytest.mark.parametrize("count", [0, 4, 6])
def test_a_wrong_count_is_refused_with_both_counts(count: int):
    with pytest.raises(FeatureCountError, match="'a'") as error:
        check_feature_count(image("a", 5), torch.randn(count, 4))
    assert f"({count}, 4)" in str(error.value)
    assert "5 positions" in str(error.value)


def test_the_count_is_that_of_the_embedded_positions():
    """A placeholder may have separators between the features."""
    feature = image("a", 5, [True, False, True, True, False])
    check_feature_count(feature, torch.randn(3, 4))
    with pytest.raises(FeatureCountError, match="3 positions"):
        check_feature_count(feature, torch.randn(5, 4))


@pytest.mark.parametrize("shape", [(5,), (1, 5, 4), (5, 2, 2)])
def test_features_of_another_rank_are_refused(shape: tuple[int, ...]):
    with pytest.raises(FeatureCountError, match="of shape"):
        check_feature_count(image("a", 5), torch.randn(shape))


def test_two_images_that_share_an_identifier_are_noticed():
    """A client may choose the identifier (``uuid``) of its images."""
    cache = EncoderCache()
    cache.put(image("mine", 5), torch.randn(5, 4))
    with pytest.raises(FeatureCountError, match=r"\(5, 4\).* 8 positions"):
        cache.get(image("mine", 8))


def test_gather_gives_views_of_the_slices_in_order():
    cache = EncoderCache()
    features = [torch.randn(5, 4), torch.randn(3, 4)]
    images = [image("a", 5), image("b", 3)]
    for spec, tensor in zip(images, features, strict=True):
        cache.put(spec, tensor)
    slices = [FeatureSlice(1, 0, 2), FeatureSlice(0, 1, 5), FeatureSlice(1, 2, 3)]
    gathered = cache.gather(images, slices)
    expected = [features[1][0:2], features[0][1:5], features[1][2:3]]
    assert [part.data_ptr() for part in gathered] == [part.data_ptr() for part in expected]
    assert all(torch.equal(*pair) for pair in zip(gathered, expected, strict=True))
    assert cache.gather(images, []) == []


def test_memory_is_that_of_the_cached_features():
    cache = EncoderCache()
    cache.put(image("a", 5), torch.zeros(5, 4, dtype=torch.bfloat16))
    cache.put(image("b", 3), torch.zeros(3, 4, dtype=torch.float32))
    assert cache.num_bytes == 5 * 4 * 2 + 3 * 4 * 4
    cache.evict(["b"])
    assert cache.num_bytes == 5 * 4 * 2

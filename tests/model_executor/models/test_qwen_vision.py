# SPDX-License-Identifier: Apache-2.0
"""The towers of Qwen-VL make Transformers' features, each depth of them."""

from typing import Any

import pytest
import torch

from tests.model_executor.models.qwen_towers import (
    random_pixels,
    random_reference,
    reference_features,
    same_tower,
    vision_config,
)
from tests.qwen_vl import MODEL_TYPES
from vllm_spyre_mm.model_executor.models import qwen_vision
from vllm_spyre_mm.model_executor.models.qwen_vision_config import (
    qwen_vision_config,
    qwen_vision_mismatch,
)

ITEMS = {
    "a square": [(1, 8, 8)],
    "the least": [(1, 2, 2)],
    "a row": [(1, 2, 22)],
    "a column": [(1, 18, 2)],
    "no whole windows": [(1, 10, 14)],
    "sizes": [(1, 4, 6), (1, 12, 8), (1, 4, 6), (1, 2, 2)],
    "a video": [(5, 6, 8)],
    "pictures and videos": [(1, 8, 8), (3, 4, 6), (1, 6, 4), (2, 8, 8)],
}
"""Frames, rows and columns of patches of each item."""


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("items", list(ITEMS))
@torch.inference_mode()
def test_features_are_those_of_transformers(model_type: str, items: str):
    vision = vision_config(model_type)
    reference = random_reference(model_type, vision)
    tower = same_tower(reference, vision)
    grids = torch.tensor(ITEMS[items])
    pixels = random_pixels(grids, vision)
    expected = reference_features(reference, pixels, grids)
    features = tower(pixels, grids)
    assert features.shape == expected.shape
    assert expected.std() > 0.1
    width = tower.config.out_hidden_size
    for mine, theirs in zip(features.split(width, -1), expected.split(width, -1), strict=True):
        assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "larger squares": ("qwen3_vl", {"spatial_merge_size": 3}),
    "levels of later layers": ("qwen3_vl", {"deepstack_visual_indexes": [1, 3]}),
    "no level": ("qwen3_vl", {"deepstack_visual_indexes": []}),
    "exact GELU": ("qwen3_vl", {"hidden_act": "gelu"}),
    "no temporal pairs": ("qwen3_vl", {"temporal_patch_size": 1}),
    "windows of three squares": ("qwen2_5_vl", {"window_size": 48}),
    "windows alone": ("qwen2_5_vl", {"fullatt_block_indexes": []}),
    "GELU in place of its approximation": ("qwen2_vl", {"hidden_act": "gelu"}),
}


@pytest.mark.parametrize("change", list(CHANGES))
@torch.inference_mode()
def test_other_configurations_are_computed_as_well(change: str):
    model_type, changes = CHANGES[change]
    vision = vision_config(model_type, **changes)
    assert qwen_vision_mismatch(vision) is None
    reference = random_reference(model_type, vision)
    side = 4 * vision.spatial_merge_size
    grids = torch.tensor([(1, side, side), (2, vision.spatial_merge_size, side)])
    pixels = random_pixels(grids, vision)
    expected = reference_features(reference, pixels, grids)
    features = same_tower(reference, vision)(pixels, grids)
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.inference_mode()
def test_projections_may_be_apart():
    vision = vision_config("qwen2_5_vl")
    reference = random_reference("qwen2_5_vl", vision)
    grids = torch.tensor([(1, 6, 6)])
    pixels = random_pixels(grids, vision)
    fused, apart = (same_tower(reference, vision, fused=fused) for fused in (True, False))
    assert "blocks.0.ff_sub_layer.wg.weight" in apart.state_dict()
    torch.testing.assert_close(apart(pixels, grids), fused(pixels, grids))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.inference_mode()
def test_batches_change_nothing(model_type: str, monkeypatch: pytest.MonkeyPatch):
    vision = vision_config(model_type)
    tower = same_tower(random_reference(model_type, vision), vision)
    grids = torch.tensor(ITEMS["pictures and videos"])
    pixels = random_pixels(grids, vision)
    together = tower(pixels, grids)
    patches = []
    for block in tower.blocks[:1]:
        block.register_forward_pre_hook(
            lambda _, __, inputs: patches.append(inputs["x"].shape[1]), with_kwargs=True
        )
    monkeypatch.setattr(qwen_vision, "BATCH_PATCHES", 50)
    torch.testing.assert_close(tower(pixels, grids), together, rtol=1e-4, atol=1e-4)
    assert patches == [64, 48, 48, 64, 64]


MISMATCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "patch_size [8, 8] is not one number": ("qwen3_vl", {"patch_size": [8, 8]}),
    "temporal_patch_size [2, 2] is not": ("qwen2_vl", {"temporal_patch_size": [2, 2]}),
    "rope_type 'default' is not implemented": (
        "qwen3_vl",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "hidden_act 'relu' is not implemented": ("qwen3_vl", {"hidden_act": "relu"}),
    "hidden_act 'gelu' is not implemented": ("qwen2_5_vl", {"hidden_act": "gelu"}),
    "num_heads does not divide": ("qwen2_vl", {"num_heads": 48}),
    "head_dim 32 is not the width / num_heads": ("qwen3_vl", {"head_dim": 32}),
    "intermediate_size 61 would be built as 60": (
        "qwen3_vl",
        {"hidden_size": 28, "num_heads": 1, "intermediate_size": 61},
    ),
    "num_position_embeddings 65 is not a square": ("qwen3_vl", {"num_position_embeddings": 65}),
    "deepstack_visual_indexes [2, 1] are not": ("qwen3_vl", {"deepstack_visual_indexes": [2, 1]}),
    "deepstack_visual_indexes [0, 4] are not": ("qwen3_vl", {"deepstack_visual_indexes": [0, 4]}),
}


@pytest.mark.parametrize("reason", list(MISMATCHES))
def test_what_would_not_be_honoured_is_named(reason: str):
    model_type, changes = MISMATCHES[reason]
    vision = vision_config(model_type, **changes)
    assert f"vision_config.{reason}" in str(qwen_vision_mismatch(vision))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_nothing_is_said_of_what_is_honoured(model_type: str):
    vision = vision_config(model_type)
    assert qwen_vision_mismatch(vision) is None
    assert qwen_vision_config(vision).head_dim == 24

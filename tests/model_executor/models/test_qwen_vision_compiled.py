# SPDX-License-Identifier: Apache-2.0
"""The towers of Qwen-VL, compiled: one graph for all sizes, and as near to fp32 as Transformers."""

import copy
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.model_executor.models.qwen_towers import (
    random_pixels,
    random_reference,
    reference_features,
    same_tower,
    vision_config,
)
from tests.qwen_vl import MODEL_TYPES
from tests.tiers import on_distinct_tiers
from vllm_spyre_mm.model_executor.cpu.encoder import compile_encoder, place_encoder
from vllm_spyre_mm.model_executor.cpu.kernels.kernel import compile_kernel
from vllm_spyre_mm.model_executor.models.qwen_vision import QwenVision

GRIDS = torch.tensor([(1, 8, 8), (3, 4, 6), (1, 10, 14), (1, 2, 2)])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.inference_mode():
        yield


def compiled(tower: QwenVision) -> QwenVision:
    """The tower as the CPU's backend places and compiles it."""
    model = nn.Module()
    model.vision_tower = tower
    overrides: Any = SimpleNamespace(
        encoder_modules=("vision_tower",), encoder_blocks=lambda model: model.vision_tower.blocks
    )
    place_encoder(model, overrides, compiled=True)
    compile_encoder(model, overrides)
    return tower


def error(features: torch.Tensor, expected: torch.Tensor, width: int) -> float:
    """The greatest of the depths' relative errors."""
    pairs = zip(features.float().split(width, -1), expected.split(width, -1), strict=True)
    return max(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fp32_is_that_of_transformers(model_type: str):
    vision = vision_config(model_type)
    reference = random_reference(model_type, vision)
    pixels = random_pixels(GRIDS, vision)
    expected = reference_features(reference, pixels, GRIDS)
    features = compiled(same_tower(reference, vision))(pixels, GRIDS)
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()


@on_distinct_tiers
@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bf16_is_as_near_as_transformers(model_type: str):
    """Compiled and eager, in each depth."""
    vision = vision_config(model_type)
    reference = random_reference(model_type, vision)
    pixels = random_pixels(GRIDS, vision)
    expected = reference_features(reference, pixels, GRIDS)
    eager = same_tower(reference, vision).bfloat16()
    width = eager.config.out_hidden_size
    theirs = reference_features(reference.bfloat16(), pixels.bfloat16(), GRIDS)
    for tower in (eager, compiled(copy.deepcopy(eager))):
        features = tower(pixels, GRIDS)
        assert features.dtype == torch.bfloat16
        assert error(features, expected, width) < 1.5 * error(theirs, expected, width)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_widths_need_not_fill_tiles(model_type: str):
    width = "embed_dim" if model_type == "qwen2_vl" else "hidden_size"
    vision = vision_config(model_type, **{width: 40, "num_heads": 2})
    reference = random_reference(model_type, vision)
    pixels = random_pixels(GRIDS, vision)
    expected = reference_features(reference, pixels, GRIDS)
    tower = compiled(same_tower(reference, vision).bfloat16())
    assert error(tower(pixels, GRIDS), expected, tower.config.out_hidden_size) < 4e-2


def made_so_far() -> dict[str, Any]:
    """What the compilers have made."""
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": dict(counters["graph_break"]),
        "kernels": compile_kernel.cache_info().misses,
    }


@pytest.mark.parametrize("first", [(1, 2, 2), (1, 8, 8), (3, 4, 4)], ids=str)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_first_picture_compiles_all_there_is(
    first: tuple[int, int, int], model_type: str, dtype: torch.dtype
):
    vision = vision_config(model_type)
    reference = random_reference(model_type, vision)
    eager = same_tower(reference, vision).to(dtype)
    tower = compiled(copy.deepcopy(eager))
    grids = torch.tensor([first])
    tower(random_pixels(grids, vision), grids)
    before = made_so_far()
    assert before["graphs"] == 1
    assert not before["breaks"]
    rng = random.Random(0)
    for _ in range(25):
        grids = torch.tensor(
            [
                (rng.choice((1, 1, 1, 4)), 2 * rng.randint(1, 9), 2 * rng.randint(1, 9))
                for _ in range(rng.randint(1, 4))
            ]
        )
        pixels = random_pixels(grids, vision)
        features = tower(pixels, grids)
        assert error(features, eager(pixels, grids).float(), len(features[0])) < 3e-2
        assert made_so_far() == before

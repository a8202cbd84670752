# SPDX-License-Identifier: Apache-2.0
"""The colouring of the demo: which colours features get, and where they are laid."""

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.demo.coloring import (
    CAPTION_HEIGHT,
    PANEL_HEIGHT,
    FeatureGrids,
    colour_maps,
    feature_grids,
    figure,
    pca_colours,
)


def random_features(count, width=16, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_colours_use_the_whole_range():
    colours = pca_colours(random_features(40))
    assert colours.shape == (40, 3)
    assert colours.dtype == torch.uint8
    assert colours.amin(dim=0).tolist() == [0, 0, 0]
    assert colours.amax(dim=0).tolist() == [255, 255, 255]


def test_colours_do_not_depend_on_the_order_or_the_place_of_the_origin():
    features = random_features(40)
    colours = pca_colours(features).int()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert (pca_colours(features[order]).int() - colours[order]).abs().max() <= 1
    assert (pca_colours(features + 3).int() - colours).abs().max() <= 1


def test_the_strongest_component_is_red():
    """Points on a line: the position on it is the red level, and it grows with the direction."""
    steps = torch.linspace(-1, 1, 256)
    direction = torch.tensor([0.1, -0.2, 5.0, 0.3])
    noise = 1e-3 * random_features(256, 4)
    red = pca_colours(steps[:, None] * direction + noise)[:, 0].int()
    assert (red - torch.arange(256)).abs().max() <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_dtype(dtype):
    assert pca_colours(random_features(9).to(dtype)).shape == (9, 3)


@pytest.mark.parametrize("features", [torch.ones(5, 8), torch.ones(1, 8), random_features(2)])
def test_few_or_equal_features_have_colours(features):
    assert pca_colours(features).shape == (len(features), 3)


@pytest.mark.parametrize(
    "size",
    [
        (48, 48),
        (96, 48),
        (48, 96),
        (100, 60),
        (61, 173),
        (400, 400),
        (1, 1),
        (2000, 10),
        (10, 2000),
    ],
)
def test_grids_have_the_processor_s_number_of_features(size):
    config = AutoConfig.from_pretrained(checkpoint_path())
    processor = AutoProcessor.from_pretrained(checkpoint_path())
    inputs = processor(text="<image>", images=Image.new("RGB", size), return_tensors="pt")
    expected = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert feature_grids(config, size).num_features == expected


def test_maps_leave_newlines_out():
    grids = FeatureGrids(base=(2, 2), fine=(2, 3))
    features = torch.zeros(grids.num_features, 4)
    features[:4] = torch.tensor([1.0, 0, 0, 0])
    fine = features[4:].view(2, 4, 4)
    fine[:, :3] = torch.tensor([0, 1.0, 0, 0])
    fine[:, 3] = 1e6  # newlines: nothing is scaled by them
    base_map, fine_map = colour_maps(features, grids)
    assert (base_map.size, fine_map.size) == ((2, 2), (3, 2))
    assert len(base_map.getcolors()) == len(fine_map.getcolors()) == 1
    assert base_map.getpixel((0, 0)) != fine_map.getpixel((0, 0))


def test_maps_need_the_grids_number_of_features():
    with pytest.raises(ValueError, match="11 features do not fill"):
        colour_maps(torch.zeros(11, 4), FeatureGrids((2, 2), (2, 3)))


@pytest.mark.parametrize(("fine", "panels"), [((4, 2), 3), ((0, 12), 2), ((12, 0), 2)])
def test_figure_has_a_panel_for_each_grid(fine, panels):
    grids = FeatureGrids((2, 2), fine)
    picture = Image.new("RGB", (50, 100), "red")
    drawn = figure(picture, random_features(grids.num_features), grids)
    assert drawn.size == (panels * PANEL_HEIGHT // 2, CAPTION_HEIGHT + PANEL_HEIGHT)
    assert drawn.getpixel((10, CAPTION_HEIGHT + 10)) == (255, 0, 0)

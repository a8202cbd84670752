# SPDX-License-Identifier: Apache-2.0
"""The colouring of the demo: which colours features get, and where they are laid."""

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.multimodal.coloring import (
    CAPTION_HEIGHT,
    PANEL_HEIGHT,
    colour_maps,
    heat,
    marked,
    pca_colours,
    pca_figure,
    place_colours,
    similarity_to,
    tiles,
)
from vllm_spyre_mm.multimodal.feature_layout import FeatureGrid, FeatureLayout
from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping


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
    assert get_mm_mapping(config).layout_of(*size).num_features == expected


LAYOUT = FeatureLayout(12, FeatureGrid(0, 2, 2, 2), FeatureGrid(4, 2, 3, 4))


def test_maps_leave_newlines_out():
    features = torch.zeros(12, 4)
    features[:4] = torch.tensor([1.0, 0, 0, 0])
    fine = features[4:].view(2, 4, 4)
    fine[:, :3] = torch.tensor([0, 1.0, 0, 0])
    fine[:, 3] = 1e6  # newlines: nothing is scaled by them
    base_map, fine_map = colour_maps(place_colours(features, LAYOUT), LAYOUT)
    assert (base_map.size, fine_map.size) == ((2, 2), (3, 2))
    assert len(base_map.getcolors()) == len(fine_map.getcolors()) == 1
    assert base_map.getpixel((0, 0)) != fine_map.getpixel((0, 0))


def test_a_feature_is_where_it_comes_from():
    colours = torch.zeros(12, 3, dtype=torch.uint8)
    colours[4 + 4 + 2] = 255  # second row, last column of the fine grid
    _, fine_map = colour_maps(colours, LAYOUT)
    assert fine_map.getpixel((2, 1)) == (255, 255, 255)
    assert sum(count for count, value in fine_map.getcolors() if value == (255, 255, 255)) == 1


def test_maps_need_the_layouts_number_of_features():
    with pytest.raises(ValueError, match="11 features do not fill"):
        colour_maps(torch.zeros(11, 3, dtype=torch.uint8), LAYOUT)


@pytest.mark.parametrize(("fine", "panels"), [(FeatureGrid(4, 4, 2, 3), 3), (None, 2)])
def test_figure_has_a_panel_for_each_grid(fine, panels):
    layout = FeatureLayout(4 + (12 if fine else 0), FeatureGrid(0, 2, 2, 2), fine)
    picture = Image.new("RGB", (50, 100), "red")
    drawn = pca_figure(picture, random_features(layout.num_features), layout)
    assert drawn.size == (panels * PANEL_HEIGHT // 2, CAPTION_HEIGHT + PANEL_HEIGHT)
    assert drawn.getpixel((10, CAPTION_HEIGHT + 10)) == (255, 0, 0)


def test_heat():
    colours = heat(torch.tensor([-1.0, 0.0, 1.0, 0.5]))
    assert colours.tolist() == [[0, 0, 255], [255, 255, 255], [255, 0, 0], [255, 128, 128]]


def test_a_place_is_most_like_itself():
    features = random_features(9)
    similarity = similarity_to(features, features[4])
    assert similarity.argmax() == 4
    assert similarity[4] == pytest.approx(1.0)


def test_borders_of_tiles_and_a_mark():
    # Two by four tiles of 3 x 3 features, of which 6 x 8 are picture: 2 columns pad each side.
    layout = FeatureLayout(63, FeatureGrid(0, 3, 3, 3), FeatureGrid(9, 6, 8, 9))
    caption, panel = tiles(Image.new("RGB", (100, 100)), (2, 4), layout)
    assert caption == "2 x 4 tiles"
    row = [panel.getpixel((x, 10)) == (255, 0, 255) for x in range(PANEL_HEIGHT)]
    crossed = [x for x in range(1, PANEL_HEIGHT) if row[x] and not row[x - 1]]
    assert crossed == pytest.approx([PANEL_HEIGHT * i / 8 for i in (1, 4, 7)], abs=2)
    assert panel.getpixel((10, PANEL_HEIGHT // 2)) == (255, 0, 255)
    assert panel.getpixel((10, PANEL_HEIGHT // 4)) == (0, 0, 0)
    white = ("", Image.new("RGB", (90, 90), "white"))
    _, framed = marked(white, FeatureGrid(0, 3, 3, 3), 1, 2)
    assert framed.getpixel((61, 31)) == (0, 0, 0)
    assert framed.getpixel((31, 31)) == (255, 255, 255)

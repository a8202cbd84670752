# SPDX-License-Identifier: Apache-2.0
"""Idefics 3 and SmolVLM: SigLIP with its final norm, pixel shuffle, tiles, Llama."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig, Qwen2MoeConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

from tests import architectures, idefics3
from tests.multimodal.mm_mappings.suite import FP32, MappingSuite, assert_close, picture
from tests.reference import Reference
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.model_executor.models.idefics3_vision import (
    PixelShuffleProjector,
    buckets_are_positions,
)
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.multimodal.mm_mappings import Idefics3, UnsupportedModelError, get_mm_mapping


class Idefics3Suite(MappingSuite):
    mapping_class = Idefics3
    config_of: ClassVar[Callable[..., PretrainedConfig]]

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        config = cls.config_of(architectures.llama(num_attention_heads=1, num_key_value_heads=1))
        return architectures.save_checkpoint(tmp_path_factory.mktemp("idefics3"), config)

    @pytest.fixture
    def other(self) -> Any:
        return architectures.llava(architectures.llama())

    def mm_kwargs(self, config: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """As vLLM has it: the tiles of all pictures one after the other, and what each has."""
        grids = grids_of(inputs["input_ids"][0].tolist())
        return {
            "pixel_values": inputs["pixel_values"][0],
            "pixel_attention_mask": inputs["pixel_attention_mask"][0],
            "num_patches": grids.prod(dim=1) + 1,
            "tile_grid": grids,
        }


def grids_of(token_ids: list[int]) -> torch.Tensor:
    """int64 ``(pictures, 2)``: rows and columns of tiles, by the tokens of a prompt."""
    grids, grid = [], (0, 0)
    for token_id in token_ids:
        name = dict(enumerate(idefics3.TOKENS, idefics3.FIRST_TOKEN_ID)).get(token_id, "")
        if name.startswith("<row_"):
            row, column = map(int, re.findall(r"\d+", name))
            grid = (max(grid[0], row), max(grid[1], column))
        elif name == "<global-img>":
            grids.append(grid)
            grid = (0, 0)
    return torch.tensor(grids)


class TestIdefics3(Idefics3Suite):
    config_of = staticmethod(idefics3.idefics3)


class TestSmolVLM(Idefics3Suite):
    config_of = staticmethod(idefics3.smolvlm)


# -- features and their places ----------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = idefics3.idefics3(architectures.llama(num_hidden_layers=1))
    return architectures.save_checkpoint(tmp_path_factory.mktemp("small"), config)


@pytest.fixture(scope="module")
def mapping(small: Path) -> Any:
    return get_mm_mapping(AutoConfig.from_pretrained(small))


@pytest.fixture(scope="module")
def model(mapping: Any, small: Path) -> Any:
    return load_model(mapping, small, FP32)


def kwargs_of(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """What vLLM's processor makes of one picture, of noise."""
    count = rows * columns + 1
    generator = torch.Generator().manual_seed(count)
    return {
        "pixel_values": torch.randn(count, 3, 64, 64, generator=generator),
        "pixel_attention_mask": torch.ones(count, 64, 64, dtype=torch.int64),
        "num_patches": torch.tensor([count]),
        "tile_grid": torch.tensor([[rows, columns]]),
    }


def item_of(rows: int, columns: int) -> dict[str, SimpleNamespace]:
    return {"tile_grid": SimpleNamespace(data=torch.tensor([rows, columns]))}


@pytest.mark.parametrize("grid", [(1, 4), (4, 1), (3, 4), (4, 4), (2, 1)])
def test_the_layout_has_the_grid_of_tiles_and_of_features_in_each(
    mapping: Any, grid: tuple[int, int]
) -> None:
    """Tile after tile, row by row, and the global tile behind them."""
    side, (rows, columns) = mapping.tile_features, grid
    layout = mapping.feature_layout(item_of(rows, columns))
    assert mapping.tile_grid(item_of(rows, columns)) == grid
    assert (layout.fine.rows // layout.fine.tile, layout.fine.columns // layout.fine.tile) == grid
    places = layout.fine.indices()
    for number in range(rows * columns):
        row, column = side * (number // columns), side * (number % columns)
        tile = torch.arange(number * side**2, (number + 1) * side**2).view(side, side)
        assert torch.equal(places[row : row + side, column : column + side], tile)
    last = torch.arange(rows * columns * side**2, layout.num_features).view(side, side)
    assert torch.equal(layout.base.indices(), last)
    assert layout.places().tolist() == list(range(layout.num_features))
    assert layout.newlines() == []


def test_a_picture_without_tiles_is_the_global_one(mapping: Any) -> None:
    layout = mapping.feature_layout(item_of(0, 0))
    assert mapping.tile_grid(item_of(0, 0)) is None
    assert layout.fine is None
    assert layout.base.indices().flatten().tolist() == list(range(layout.num_features))


def test_a_feature_is_a_square_of_patches(mapping: Any) -> None:
    """The projector moves nothing: a patch changes the feature at its place and no other."""
    projector = PixelShuffleProjector(hidden_size=5, width=7, scale=2)
    patches = torch.randn(1, 64, 5)
    before = projector(patches)
    for row, column in [(0, 0), (0, 1), (3, 6), (7, 7)]:
        changed = patches.clone()
        changed[0, 8 * row + column] += 1
        (index,) = (projector(changed) != before)[0].any(dim=1).nonzero()[:, 0].tolist()
        assert index == 4 * (row // 2) + column // 2


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 13, 17])
def test_tiles_are_encoded_a_few_at_a_time(
    mapping: Any, model: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Never one of several alone: it would need a graph that the warmup does not make."""
    given = kwargs_of(1, count - 1)
    (whole,) = mapping.compute_features(model, given)
    monkeypatch.setattr("vllm_spyre_mm.multimodal.mm_mappings.vision_language.PATCHES_AT_ONCE", 1)
    seen, select = [], type(model).select_hidden_states

    def counting(self: Any, pixels: torch.Tensor) -> Pieces[torch.Tensor]:
        seen.append(len(pixels))
        return select(self, pixels)

    monkeypatch.setattr(type(model), "select_hidden_states", counting)
    (parts,) = mapping.compute_features(model, given)
    assert_close(parts, whole, 1e-5)
    assert sum(seen) == count
    assert max(seen) <= 3
    assert min(seen) >= min(2, count)


def test_pixels_as_one_tensor_and_as_a_list_give_the_same(mapping: Any, model: Any) -> None:
    first, second = kwargs_of(1, 2), kwargs_of(2, 2)
    both = {name: torch.cat([first[name], second[name]]) for name in first}
    names = ("pixel_values", "pixel_attention_mask")
    listed = {name: [first[name], second[name]] for name in names}
    pairs = zip(
        mapping.compute_features(model, both),
        mapping.compute_features(model, both | listed),
        strict=True,
    )
    assert all(torch.equal(*pair) for pair in pairs)


# -- what is not exact is refused ---------------------------------------------------------------


def test_padded_tiles_are_refused(mapping: Any, model: Any) -> None:
    given = kwargs_of(1, 2)
    given["pixel_attention_mask"][1, 40:] = 0
    with pytest.raises(ValueError, match="the processor pads tiles"):
        mapping.compute_features(model, given)


def test_tiles_of_another_size_are_refused(mapping: Any, model: Any) -> None:
    given = kwargs_of(1, 2)
    given["pixel_values"] = torch.zeros(3, 3, 64, 72)
    with pytest.raises(ValueError, match=r"tiles of 72x64 pixels, but the tower takes 64x64"):
        mapping.compute_features(model, given)


@pytest.mark.parametrize("side", [1, 4, 6, 8, 19, 25, 26, 27, 32, 40])
def test_positions_are_the_buckets_of_transformers(side: int) -> None:
    """In fp32, for a full tile: the buckets of a few sides are not the patches' own places."""
    config = SmolVLMVisionConfig(
        hidden_size=1, num_attention_heads=1, image_size=side, patch_size=1, num_channels=1
    )
    embeddings = SmolVLMVisionEmbeddings(config)
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight[:, 0] = torch.arange(side**2)
        mask = torch.ones(1, side, side, dtype=torch.bool)
        positions = embeddings(torch.zeros(1, 1, side, side), mask)
    identity = positions.flatten().tolist() == list(range(side**2))
    assert buckets_are_positions(side) is identity
    assert identity is (side not in (19, 25, 40))


VARIANTS: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "no shuffling": (architectures.llama(), {"scale_factor": 1}),
    "larger squares": (architectures.llama(), {"scale_factor": 4}),
    "gelu in the tower": (architectures.llama(), {"vision_config.hidden_act": "gelu"}),
    "another epsilon in the tower": (architectures.llama(), {"vision_config.layer_norm_eps": 1e-2}),
    "pixels beyond the last patch": (architectures.llama(), {"vision_config.image_size": 70}),
    "Granite": (architectures.granite(), {}),
    "Mistral": (architectures.mistral(), {}),
    "a tied head": (architectures.llama(tie_word_embeddings=True), {}),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_what_a_configuration_may_vary_is_honoured(tmp_path: Path, variant: str) -> None:
    text, changes = VARIANTS[variant]
    checkpoint = architectures.save_checkpoint(tmp_path, idefics3.idefics3(text, **changes))
    mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
    model, reference = load_model(mapping, checkpoint, FP32), Reference(checkpoint)
    suite, images = TestIdefics3(), [picture(100, 60), picture(30, 70)]
    features = torch.cat(suite.features(mapping, model, reference, images))
    assert_close(features, reference.features(suite.prompt(reference, 2), images), 1e-4)
    assert_close(*suite.logits(mapping, model, reference, images), 1e-4)


REFUSED: dict[str, dict[str, Any]] = {
    "vision_config.model_type 'clip_vision_model'": {"vision_config": architectures.clip()},
    "text_config.model_type 'qwen2_moe'": {"text_config": Qwen2MoeConfig()},
    "vision_config.hidden_act 'relu'": {"vision_config.hidden_act": "relu"},
    "scale_factor 3 does not divide the 8 patches": {"scale_factor": 3},
    "image_size 200 gives 25 patches on a side": {
        "vision_config.image_size": 200,
        "scale_factor": 5,
    },
    "text_config.sliding_window 64": {"text_config": architectures.mistral(sliding_window=64)},
}


@pytest.mark.parametrize("named", list(REFUSED))
def test_what_would_not_be_honoured_is_refused_by_name(named: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        get_mm_mapping(idefics3.idefics3(architectures.llama(), **REFUSED[named]))
    assert named in str(error.value)


# -- the card ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["heads of 64", "heads of 32 and a tied head"])
def test_llamas_heads_are_padded_for_the_card(tmp_path: Path, text: str) -> None:
    """As Granite Docling's are: FMS's Llama cannot, its Granite can."""
    changes = {
        "heads of 64": {"num_attention_heads": 2, "num_key_value_heads": 1},
        "heads of 32 and a tied head": {"tie_word_embeddings": True, "mlp_bias": True},
    }[text]
    config = idefics3.idefics3(architectures.llama(**changes))
    checkpoint = architectures.save_checkpoint(tmp_path, config)
    mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
    assert mapping.kv_cache_options(for_card=True).head_dim == 128
    options = LoadOptions(torch.float32, torch.float32, for_card=True)
    model, reference = load_model(mapping, checkpoint, options), Reference(checkpoint)
    images = [picture(100, 60)]
    assert_close(*TestIdefics3().logits(mapping, model, reference, images), 1e-4)


LLAMA_3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
    "rope_theta": 500000.0,
}


@pytest.mark.parametrize("changes", [{"rope_parameters": LLAMA_3}, {"attention_bias": True}])
def test_heads_that_granite_would_compute_otherwise_are_not_padded(changes: Any) -> None:
    mapping = get_mm_mapping(idefics3.idefics3(architectures.llama(**changes)))
    assert mapping.kv_cache_options().head_dim == 32
    with pytest.raises(UnsupportedModelError, match="heads of 32 cannot be padded"):
        mapping.kv_cache_options(for_card=True)

# SPDX-License-Identifier: Apache-2.0
"""The grid of tiles of each picture, as vLLM's processor of Idefics 3 and SmolVLM hands it over."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY

from tests import architectures, idefics3
from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.frontend.processor_registration import register_image_processor

TEXT = architectures.llama(num_hidden_layers=1)


def processor_of(folder: Path, tiles: int = 4, config_of: Any = idefics3.idefics3) -> Any:
    config = config_of(TEXT)
    config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    idefics3.save_processor(folder, config, tokenizer, tiles)
    return registered(folder)


def registered(folder: Path) -> Any:
    model_config = EngineArgs(model=str(folder)).create_model_config()
    register_image_processor(model_config)
    return MULTIMODAL_REGISTRY.create_processor(model_config)


def process(processor: Any, *sizes: tuple[int, int], **kwargs: Any) -> Any:
    images = [Image.new("RGB", size, (size[0] % 256, size[1] % 256, 9)) for size in sizes]
    items = processor.info.parse_mm_data({"image": images}, validate=False)
    return processor([5] * len(images), items, hf_processor_mm_kwargs=kwargs)


def grids(processed: Any) -> list[tuple[int, int]]:
    return [tuple(item["tile_grid"].data.tolist()) for item in processed["mm_kwargs"]["image"]]


@pytest.fixture(
    scope="module", params=[idefics3.idefics3, idefics3.smolvlm], ids=["idefics3", "smolvlm"]
)
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return processor_of(tmp_path_factory.mktemp("processor"), config_of=request.param)


GRIDS: dict[tuple[int, int], tuple[int, int]] = {
    (60, 60): (4, 4),
    (90, 120): (4, 3),
    (120, 90): (3, 4),
    (1000, 20): (1, 4),
    (20, 1000): (4, 1),
    (1, 1): (4, 4),
    (400, 200): (2, 4),
    (4000, 10): (1, 4),
    (3000, 4000): (4, 3),
}


def test_each_picture_has_its_grid(processor: Any) -> None:
    processed = process(processor, *GRIDS)
    assert grids(processed) == list(GRIDS.values())
    for item, (rows, columns) in zip(processed["mm_kwargs"]["image"], GRIDS.values(), strict=True):
        assert len(item["pixel_values"].data) == rows * columns + 1
        assert bool(item["pixel_attention_mask"].data.all())


def test_the_prompt_names_the_tiles_of_the_grid(processor: Any) -> None:
    processed = process(processor, (120, 90))
    tokenizer = processor.info.get_tokenizer()
    names = tokenizer.convert_ids_to_tokens(processed["prompt_token_ids"])
    rows, columns = grids(processed)[0]
    tiles = [name for name in names if name.startswith("<row_")]
    expected = [f"<row_{1 + i // columns}_col_{1 + i % columns}>" for i in range(rows * columns)]
    assert tiles == expected


def test_a_picture_that_is_not_split_has_none(processor: Any) -> None:
    assert grids(process(processor, (120, 90), do_image_splitting=False)) == [(0, 0)]


def test_a_request_may_choose_other_sizes(processor: Any) -> None:
    processed = process(processor, (120, 90), (90, 120), size={"longest_edge": 128})
    assert grids(processed) == [(2, 2), (2, 2)]


def test_a_processor_whose_tiles_vllm_counts_otherwise_is_refused(tmp_path: Path) -> None:
    processor_of(tmp_path)
    file = tmp_path / "processor_config.json"
    written = json.loads(file.read_text())
    written["image_processor"]["size"] = {"longest_edge": 160}
    file.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"makes \d+ tiles of images that have \d+ in the prompt"):
        process(registered(tmp_path), (160, 120))


def test_another_models_pictures_have_none(tmp_path: Path) -> None:
    config = architectures.llava(TEXT)
    config.save_pretrained(tmp_path)
    architectures.save_processor(tmp_path, config)
    (item,) = process(registered(tmp_path), (60, 40))["mm_kwargs"]["image"]
    assert "tile_grid" not in item

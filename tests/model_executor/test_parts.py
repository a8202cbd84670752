# SPDX-License-Identifier: Apache-2.0
"""Either part of a model by itself: its tensors alone are read, and it computes what it did."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from tests import architectures, qwen_vl
from tests.checkpoints import edit_tensors, llava_next_config
from vllm_spyre_mm.config import CardSettings
from vllm_spyre_mm.model_executor.backend import Backend, StepSizes
from vllm_spyre_mm.model_executor.card.backend import CardBackend
from vllm_spyre_mm.model_executor.checkpoint import CheckpointError
from vllm_spyre_mm.model_executor.cpu.backend import CpuBackend
from vllm_spyre_mm.model_executor.dummy_weights import load_dummy_model
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.model_executor.model import SpyreModel
from vllm_spyre_mm.model_executor.parts import ModelPart
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils, get_mm_mapping

FP32 = LoadOptions(torch.float32, torch.float32)
SIZES = StepSizes(
    block_size=64, chunk_size=64, context_len=256, max_batch_tkv=512, max_num_seqs=2, max_blocks=4
)
CONFIGS = {"llava_next": llava_next_config(), "qwen3_vl": qwen_vl.qwen3_vl()}
OF_ENCODER = ("vision_tower.", "multi_modal_projector.", "image_newline")
STORED = {
    ModelPart.ENCODER: ("vision_tower.", "model.visual."),
    ModelPart.DECODER: ("language_model.", "model.language_model."),
}
"""How names of the parts begin in the checkpoints."""

ALONE = (ModelPart.ENCODER, ModelPart.DECODER)


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return architectures.save_checkpoint(folder, CONFIGS[request.param])


@pytest.fixture(scope="module")
def mapping(checkpoint: Path) -> MMUtils:
    return get_mm_mapping(AutoConfig.from_pretrained(checkpoint))


@pytest.fixture(scope="module")
def whole(checkpoint: Path, mapping: MMUtils) -> Any:
    return load_model(mapping, checkpoint, FP32)


def load(mapping: MMUtils, checkpoint: Path, part: ModelPart) -> Any:
    return load_model(mapping, checkpoint, dataclasses.replace(FP32, part=part))


def belongs(name: str, part: ModelPart) -> bool:
    return name.startswith(OF_ENCODER) == (part is ModelPart.ENCODER)


@pytest.mark.parametrize("part", ALONE)
def test_a_part_has_the_tensors_that_the_whole_model_has_for_it(
    mapping: MMUtils, checkpoint: Path, whole: Any, part: ModelPart
) -> None:
    found = load(mapping, checkpoint, part).state_dict()
    expected = {n: each for n, each in whole.state_dict().items() if belongs(n, part)}
    assert expected
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    made_up = load_dummy_model(mapping, dataclasses.replace(FP32, part=part), 0).state_dict()
    assert {n: each.shape for n, each in made_up.items()} == {n: e.shape for n, e in found.items()}


@pytest.mark.parametrize("part", ALONE)
def test_the_tensors_of_the_other_part_are_not_read(
    mapping: MMUtils, checkpoint: Path, tmp_path: Path, part: ModelPart
) -> None:
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    stored = load_file(checkpoint / "model.safetensors")
    other = ModelPart.DECODER if part is ModelPart.ENCODER else ModelPart.ENCODER
    name = next(each for each in stored if each.startswith(STORED[other]))
    edit_tensors(damaged, {name: stored[name] * torch.nan})
    load(mapping, damaged, part)
    for faulty in (other, ModelPart.WHOLE):
        with pytest.raises(CheckpointError, match="not finite"):
            load(mapping, damaged, faulty)


def backends() -> list[Backend]:
    return [
        CpuBackend(SIZES, compiled=False),
        CpuBackend(SIZES, compiled=True),
        CardBackend(SIZES, CardSettings()),
    ]


@pytest.mark.parametrize("part", ALONE)
@pytest.mark.parametrize("backend", backends(), ids=["eager", "inductor", "card"])
def test_a_part_is_placed_on_every_backend(
    mapping: MMUtils, checkpoint: Path, part: ModelPart, backend: Backend
) -> None:
    model = SpyreModel(load(mapping, checkpoint, part), mapping, backend, part)
    if part is ModelPart.DECODER:
        assert model.embed(torch.tensor([[5, 6]])).isfinite().all()
    if not backend.for_card:  # the card's compiler is not here
        model.compile()

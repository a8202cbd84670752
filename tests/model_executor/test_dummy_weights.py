# SPDX-License-Identifier: Apache-2.0
"""Random weights: every parameter of every architecture, the same for a seed, finite results."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from tests import architectures, granite4_vision
from tests.checkpoints import llava_next_config
from vllm_spyre_mm.model_executor.dummy_weights import load_dummy_model
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping

TIED = {"tie_word_embeddings": True}
CONFIGS: dict[str, PretrainedConfig] = {
    "granite vision": llava_next_config(),
    "llava": architectures.llava(architectures.llama()),
    "llava-next": architectures.llava_next(architectures.mistral()),
    "mistral3": architectures.mistral3(architectures.ministral3()),
    "granite vision 4": granite4_vision.granite4_vision(),
    "granite": architectures.granite(**TIED),
    "llama": architectures.llama(),
    "mistral": architectures.mistral(**TIED),
    "qwen3": architectures.qwen3(**TIED),
}
FP32 = LoadOptions(torch.float32, torch.float32)


def config_of(name: str, folder: Path) -> Any:
    """The configuration as it is read, from a folder that holds nothing else."""
    CONFIGS[name].save_pretrained(folder)
    return AutoConfig.from_pretrained(folder)


HOST = LoadOptions(torch.bfloat16, torch.float32)
CARD = LoadOptions(torch.float16, torch.float16, for_card=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, HOST) for name in CONFIGS), ("granite vision", CARD), ("granite", CARD)],
)
def test_every_parameter_as_in_a_checkpoint(
    name: str, options: LoadOptions, tmp_path: Path
) -> None:
    checkpoint = architectures.save_checkpoint(tmp_path, CONFIGS[name])
    mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
    expected = load_model(mapping, checkpoint, options).state_dict()
    made_up = load_dummy_model(mapping, options, seed=0)
    found = made_up.state_dict()
    assert shapes_and_dtypes(found) == shapes_and_dtypes(expected)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert not any(each.requires_grad for each in made_up.parameters())


def shapes_and_dtypes(state: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


@pytest.mark.parametrize("name", ["mistral3", "qwen3"])
def test_a_seed_gives_the_same_weights(name: str, tmp_path: Path) -> None:
    mapping = get_mm_mapping(config_of(name, tmp_path))
    once, again, other = (load_dummy_model(mapping, FP32, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(once[n], again[n]) for n in once)
    matrices = [n for n, tensor in once.items() if tensor.ndim > 1]
    assert matrices
    assert not any(torch.equal(once[n], other[n]) for n in matrices)


def test_matrices_keep_the_scale_of_their_input(tmp_path: Path) -> None:
    mapping = get_mm_mapping(config_of("granite vision", tmp_path))
    for name, tensor in load_dummy_model(mapping, FP32, 0).state_dict().items():
        if tensor.ndim > 1:
            fan_in = tensor[0].numel()
            assert float(tensor.std()) * fan_in**0.5 == pytest.approx(1.0, rel=0.1), name
        elif name.endswith("bias"):
            assert not tensor.any(), name


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    mapping = get_mm_mapping(config_of("granite", tmp_path))
    model = load_dummy_model(mapping, FP32, 0).language_model
    assert model.head.weight is model.base_model.embedding.weight

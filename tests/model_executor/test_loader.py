# SPDX-License-Identifier: Apache-2.0
"""A checkpoint fills the model exactly, whatever wrote it, or is refused with names."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.checkpoints import (
    Layout,
    edit_tensors,
    llava_next_config,
    rename_tensors,
    save_random_checkpoint,
    shard,
)
from vllm_spyre_mm.model_executor.checkpoint import CheckpointError
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.model_executor.pieces import whole
from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping

HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
DECODER_LAYER = "language_model.model.layers.1"
ENCODER_LAYER = "vision_tower.encoder.layers.1"
FMS_DECODER_LAYER = "language_model.base_model.layers.1"
FMS_ENCODER_LAYER = "vision_tower.base_model.encoder.layers.1"

NAMES = {
    "image_newline": "image_newline",
    HEAD: "language_model.head.weight",
    EMBEDDING: "language_model.base_model.embedding.weight",
    "language_model.model.norm.weight": "language_model.base_model.dec_norm.weight",
    "multi_modal_projector.linear_1.bias": "multi_modal_projector.linear_1.bias",
    f"{DECODER_LAYER}.input_layernorm.weight": f"{FMS_DECODER_LAYER}.ln.weight",
    f"{DECODER_LAYER}.self_attn.q_proj.weight": f"{FMS_DECODER_LAYER}.attn.in_proj.query.weight",
    f"{DECODER_LAYER}.self_attn.o_proj.weight": f"{FMS_DECODER_LAYER}.attn.dense.weight",
    f"{DECODER_LAYER}.mlp.up_proj.weight": f"{FMS_DECODER_LAYER}.ff_sub_layer.w1.weight",
    f"{DECODER_LAYER}.mlp.down_proj.weight": f"{FMS_DECODER_LAYER}.ff_sub_layer.w2.weight",
    f"{ENCODER_LAYER}.self_attn.v_proj.bias": f"{FMS_ENCODER_LAYER}.attn.in_proj.value.bias",
    f"{ENCODER_LAYER}.mlp.fc1.weight": f"{FMS_ENCODER_LAYER}.mlp.w1.weight",
    "vision_tower.embeddings.position_embedding.weight": (
        "vision_tower.base_model.embeddings.position_embedding.weight"
    ),
}
"""Some tensors of every kind: the name in the checkpoint, and FMS's. Errors may give either."""


@pytest.fixture
def checkpoint(llava_next_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the random checkpoint, to be damaged."""
    return Path(shutil.copytree(llava_next_checkpoint, tmp_path / "copy"))


def load(
    checkpoint: Path,
    decoder_dtype: torch.dtype = torch.float32,
    encoder_dtype: torch.dtype = torch.float32,
) -> Any:
    mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
    return load_model(mapping, checkpoint, LoadOptions(decoder_dtype, encoder_dtype))


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def assert_names(error: pytest.ExceptionInfo[CheckpointError], stored_name: str) -> None:
    message = str(error.value)
    assert stored_name in message or NAMES[stored_name] in message


def assert_same_parameters(one: Any, other: Any) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


# -- what is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["transformers4", "transformers4.52"])
def test_every_layout_of_names_gives_the_same_model(
    checkpoint: Path, llava_next_checkpoint: Path, layout: Layout
):
    rename_tensors(checkpoint, layout)
    assert tensors_of(checkpoint).keys() != tensors_of(llava_next_checkpoint).keys()
    assert_same_parameters(load(checkpoint), load(llava_next_checkpoint))


def test_tensors_arrive_unchanged(llava_next_checkpoint: Path):
    """The ones that FMS neither permutes nor fuses."""
    tensors, state = tensors_of(llava_next_checkpoint), load(llava_next_checkpoint).state_dict()
    compared = 0
    for stored_name, name in NAMES.items():
        if name in state:
            assert torch.equal(state[name], tensors[stored_name])
            compared += 1
    assert compared >= 9
    fused = state[f"{FMS_ENCODER_LAYER}.attn.in_proj.qkv_fused.weight"]
    projections = [tensors[f"{ENCODER_LAYER}.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(fused, torch.cat(projections))


def test_a_loaded_model_is_whole_and_for_inference(llava_next_checkpoint: Path):
    model = load(llava_next_checkpoint)
    assert not model.training
    assert not any(module.training for module in model.modules())
    for tensor in [*model.parameters(), *model.buffers()]:
        assert tensor.device.type == "cpu"
        assert not tensor.requires_grad


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_decoder_and_encoder_get_the_dtypes_that_are_asked_for(tmp_path: Path, stored: torch.dtype):
    checkpoint = save_random_checkpoint(tmp_path, llava_next_config(), dtype=stored)
    assert {tensor.dtype for tensor in tensors_of(checkpoint).values()} == {stored}
    for decoder, encoder in [(torch.float16, torch.bfloat16), (torch.float32, torch.float32)]:
        model = load(checkpoint, decoder, encoder)
        assert {tensor.dtype for tensor in model.language_model.parameters()} == {decoder}
        assert {tensor.dtype for tensor in model.vision_tower.parameters()} == {encoder}
        assert {tensor.dtype for tensor in model.multi_modal_projector.parameters()} == {encoder}
        assert model.image_newline.dtype == encoder
        state = model.state_dict()
        for stored_name, tensor in tensors_of(checkpoint).items():
            name = NAMES.get(stored_name)
            if name in state:
                assert torch.equal(state[name], tensor.to(state[name].dtype))


def test_the_process_keeps_its_default_dtype(llava_next_checkpoint: Path):
    load(llava_next_checkpoint, torch.bfloat16, torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("num_files", [2, 5])
def test_a_checkpoint_in_several_files_is_one_model(
    checkpoint: Path, llava_next_checkpoint: Path, num_files: int
):
    """Layers are split between files, so that no file is whole by itself."""
    shard(checkpoint, num_files)
    assert_same_parameters(load(checkpoint), load(llava_next_checkpoint))


# -- what takes no part ---------------------------------------------------------------------------


def test_siglips_pooling_head_is_neither_loaded_nor_computed(tmp_path: Path):
    config = llava_next_config(vision_config__vision_use_head=True)
    checkpoint = save_random_checkpoint(tmp_path, config)
    head = [name for name in tensors_of(checkpoint) if name.startswith("vision_tower.head.")]
    assert head
    edit_tensors(checkpoint, {name: torch.full((2,), torch.nan) for name in head})
    model = load(checkpoint)
    assert isinstance(model.vision_tower.head, torch.nn.Identity)
    assert not any("head" in name for name in model.vision_tower.state_dict())
    features = whole(model.select_hidden_states(torch.randn(2, 3, 48, 48)))
    assert features.isfinite().all()


@pytest.mark.parametrize("damage", ["dropped", "not finite", "another shape"])
def test_what_lies_above_the_last_feature_layer_is_ignored(
    checkpoint: Path, llava_next_checkpoint: Path, damage: str
):
    """The tower has 4 layers and the features are those of the third; then comes a norm."""
    above = [
        name
        for name in tensors_of(checkpoint)
        if name.startswith(("vision_tower.encoder.layers.3.", "vision_tower.post_layernorm."))
    ]
    assert len(above) > 10
    new = {"dropped": None, "not finite": torch.full((2,), torch.nan)}.get(damage, torch.ones(7))
    edit_tensors(checkpoint, {name: None if new is None else new.clone() for name in above})
    assert_same_parameters(load(checkpoint), load(llava_next_checkpoint))


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("stored_name", list(NAMES))
def test_a_missing_tensor_is_named(checkpoint: Path, stored_name: str):
    edit_tensors(checkpoint, {stored_name: None})
    with pytest.raises(CheckpointError) as error:
        load(checkpoint)
    assert_names(error, stored_name)
    assert str(checkpoint) in str(error.value)


@pytest.mark.parametrize("layer", [DECODER_LAYER, ENCODER_LAYER])
def test_a_missing_layer_is_named(checkpoint: Path, layer: str):
    dropped = [name for name in tensors_of(checkpoint) if name.startswith(f"{layer}.")]
    edit_tensors(checkpoint, dict.fromkeys(dropped))
    with pytest.raises(CheckpointError, match=r"missing: .*layers\.1\.attn"):
        load(checkpoint)


def test_a_missing_vision_tower_is_summarised(checkpoint: Path):
    """This is how it looks to FMS when it does not know the layout of the names."""
    dropped = [name for name in tensors_of(checkpoint) if name.startswith("vision_tower.")]
    edit_tensors(checkpoint, dict.fromkeys(dropped))
    with pytest.raises(CheckpointError, match=r"missing: vision_tower\..* and \d+ more"):
        load(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.3.input_layernorm.weight",  # one layer more than configured
        f"{DECODER_LAYER}.self_attn.q_norm.weight",
        "vision_tower.embeddings.class_embedding",
        "something.else",
    ],
)
def test_an_unexpected_tensor_is_named(checkpoint: Path, name: str):
    edit_tensors(checkpoint, {name: torch.ones(256)})
    with pytest.raises(CheckpointError, match="unexpected: ") as error:
        load(checkpoint)
    assert name.rpartition(".")[0].rpartition(".")[0].split(".")[-1] in str(error.value)


@pytest.mark.parametrize("stored_name", list(NAMES))
def test_a_wrongly_shaped_tensor_is_named(checkpoint: Path, stored_name: str):
    tensor = tensors_of(checkpoint)[stored_name]
    edit_tensors(checkpoint, {stored_name: tensor.new_ones(tensor.shape[0] + 1, *tensor.shape[1:])})
    with pytest.raises(CheckpointError) as error:
        load(checkpoint)
    assert_names(error, stored_name)


def test_a_wrong_shape_is_shown_beside_the_right_one(checkpoint: Path):
    edit_tensors(checkpoint, {"image_newline": torch.ones(7)})
    with pytest.raises(CheckpointError, match=r"stored \(7,\), needed \(256,\)"):
        load(checkpoint)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_value_that_is_not_finite_is_noticed(
    checkpoint: Path, value: float, dtype: torch.dtype
):
    for stored_name, name in [
        (f"{DECODER_LAYER}.mlp.down_proj.weight", "ff_sub_layer.w2.weight"),
        (f"{DECODER_LAYER}.self_attn.k_proj.weight", "layers.1.attn.in_proj.qkv_fused.weight"),
        ("image_newline", "image_newline"),
    ]:
        tensor = tensors_of(checkpoint)[stored_name]
        damaged = tensor.clone()
        damaged.view(-1)[-3] = value
        edit_tensors(checkpoint, {stored_name: damaged})
        with pytest.raises(CheckpointError, match="not finite: ") as error:
            load(checkpoint, dtype, dtype)
        assert name in str(error.value)
        edit_tensors(checkpoint, {stored_name: tensor})
    load(checkpoint)


def test_opposite_infinities_do_not_cancel(checkpoint: Path):
    newline = tensors_of(checkpoint)["image_newline"]
    newline[0], newline[1] = math.inf, -math.inf
    edit_tensors(checkpoint, {"image_newline": newline})
    with pytest.raises(CheckpointError, match="not finite: image_newline"):
        load(checkpoint)


def test_a_weight_that_overflows_the_asked_dtype_is_noticed(checkpoint: Path):
    """bf16 checkpoints hold values that fp16, the card's dtype, does not."""
    weight = tensors_of(checkpoint)[EMBEDDING]
    weight[3, 3] = 1e5
    edit_tensors(checkpoint, {EMBEDDING: weight})
    load(checkpoint, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"not finite: .*embedding"):
        load(checkpoint, torch.float16)


def test_large_finite_weights_of_a_narrow_dtype_are_accepted(checkpoint: Path):
    """Their sum is beyond fp16, each of them is not."""
    weight = torch.full_like(tensors_of(checkpoint)[EMBEDDING], 1000.0)
    edit_tensors(checkpoint, {EMBEDDING: weight})
    assert load(checkpoint, torch.float16).language_model.base_model.embedding.weight.max() == 1000


@pytest.mark.parametrize("kept", [0, 4, 1000, -1000])
def test_a_truncated_file_is_named(checkpoint: Path, kept: int):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load(checkpoint)


def test_a_file_of_something_else_is_named(checkpoint: Path):
    (checkpoint / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load(checkpoint)


def test_missing_shards_are_noticed(checkpoint: Path):
    files = shard(checkpoint, 4)
    for file in files[::2]:
        file.unlink()
    with pytest.raises(CheckpointError, match=str(checkpoint)) as error:
        load(checkpoint)
    assert "missing: " in str(error.value) or "whole layers" in str(error.value)

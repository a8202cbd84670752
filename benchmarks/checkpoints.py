# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints of a chosen size; speed does not depend on the weights."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from vllm_spyre_mm.demo import checkpoint_path

COMPLETE = "benchmark.json"
"""Written last: a folder that has it holds a whole checkpoint, and which one."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model to be made up: Granite Vision, or LLaVA-Next with CLIP and Llama.

    Attributes:
        name: of its folder.
        tile: side of a tile in pixels.
        patch: side of a patch in pixels.
        vision: width, feed-forward width, heads and layers of the tower.
        text: width, feed-forward width, heads, KV heads and layers of the decoder.
        vocab_size: rows of the embedding, which the head shares.
        feature_layers: hidden states of the tower that make the features.
        clip: a CLIP tower and a Llama decoder, in place of SigLIP and Granite.
    """

    name: str
    tile: int
    patch: int
    vision: tuple[int, int, int, int]
    text: tuple[int, int, int, int, int]
    vocab_size: int
    feature_layers: tuple[int, ...]
    clip: bool = False


SMALL = ModelSize(
    name="granite-vision-160m",
    tile=224,
    patch=14,
    vision=(384, 1536, 6, 12),
    text=(1024, 2816, 8, 2, 10),
    vocab_size=24_576,
    feature_layers=(-9, -6, -3, -1),
)
"""160 M parameters. A picture of 448 x 448 makes 1,312 features."""

TOWER = ModelSize(
    name="granite-vision-tower",
    tile=384,
    patch=14,
    vision=(1152, 4304, 16, 27),
    text=(256, 512, 4, 2, 1),
    vocab_size=512,
    feature_layers=(-24, -20, -12, -1),
)
"""The vision tower of Granite Vision 3.x (27 layers of 1152, 729 patches), one decoder layer."""

BESIDE_CARD = ModelSize(
    name="granite-vision-beside-card",
    tile=224,
    patch=14,
    vision=(768, 3072, 12, 12),
    text=(256, 512, 4, 2, 1),
    vocab_size=512,
    feature_layers=(-9, -6, -3, -1),
)
"""A tower that takes a while, and a decoder that takes none: a stand-in is the card's time."""

LLAVA_NEXT = ModelSize(
    name="llava-next-clip-llama",
    tile=336,
    patch=14,
    vision=(1024, 4096, 16, 24),
    text=(1024, 2816, 8, 2, 10),
    vocab_size=24_576,
    feature_layers=(-2,),
    clip=True,
)
"""The vision tower of most LLaVA-Next checkpoints (CLIP ViT-L/14 at 336), 160 M of Llama."""


def ensure_checkpoint(size: ModelSize, folder: Path) -> Path:
    """A bf16 checkpoint of this size in ``folder``, made if it is not there yet."""
    path = folder / size.name
    description = json.dumps(repr(size))
    if (path / COMPLETE).is_file() and (path / COMPLETE).read_text() == description:
        return path
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(_config(size)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02)
    model.tie_weights()
    model.save_pretrained(path)
    _rename_tower(path / "model.safetensors")
    _write_processor(size, path)
    (path / COMPLETE).write_text(description)
    return path


def _rename_tower(file: Path) -> None:
    """Give the tower's tensors their names of Transformers 4, which vLLM's own model knows."""
    tower = "vision_tower."
    tensors = {
        name.replace(tower, f"{tower}vision_model.", 1): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def _config(size: ModelSize) -> LlavaNextConfig:
    return _clip_config(size) if size.clip else _granite_config(size)


def _clip_config(size: ModelSize) -> LlavaNextConfig:
    demo = AutoConfig.from_pretrained(checkpoint_path())
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    vision = CLIPVisionConfig(
        **dict(zip(names, size.vision, strict=True)), image_size=size.tile, patch_size=size.patch
    )
    width, inner, heads, kv_heads, layers = size.text
    text = LlamaConfig(
        **dict(zip(names, (width, inner, heads, layers), strict=True)),
        num_key_value_heads=kv_heads,
        vocab_size=size.vocab_size,
        max_position_embeddings=8192,
        bos_token_id=demo.bos_token_id,
        eos_token_id=demo.eos_token_id,
        pad_token_id=demo.pad_token_id,
    )
    return LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=demo.image_token_index,
        image_grid_pinpoints=_pinpoints(demo.image_grid_pinpoints, size),
        image_seq_length=(size.tile // size.patch) ** 2,
    )


def _granite_config(size: ModelSize) -> LlavaNextConfig:
    config = AutoConfig.from_pretrained(checkpoint_path())
    vision, text = config.vision_config, config.text_config
    (
        vision.hidden_size,
        vision.intermediate_size,
        vision.num_attention_heads,
        vision.num_hidden_layers,
    ) = size.vision
    vision.image_size, vision.patch_size = size.tile, size.patch
    (
        text.hidden_size,
        text.intermediate_size,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.num_hidden_layers,
    ) = size.text
    text.head_dim = text.hidden_size // text.num_attention_heads
    text.vocab_size = size.vocab_size
    config.vision_feature_layer = list(size.feature_layers)
    config.image_grid_pinpoints = _pinpoints(config.image_grid_pinpoints, size)
    config.image_seq_length = (size.tile // size.patch) ** 2
    return config


def _pinpoints(grid: list[list[int]], size: ModelSize) -> list[list[int]]:
    """The demo checkpoint's grids in tiles of this size."""
    demo_tile = AutoConfig.from_pretrained(checkpoint_path()).vision_config.image_size
    return [[side // demo_tile * size.tile for side in sides] for sides in grid]


def _write_processor(size: ModelSize, path: Path) -> None:
    """The demo checkpoint's tokenizer, and its processor with tiles of this size."""
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(checkpoint_path() / file, path / file)
    for file in ("preprocessor_config.json", "processor_config.json"):
        content = json.loads((checkpoint_path() / file).read_text())
        image = content.get("image_processor", content)
        image["crop_size"] = image["size"] = {"height": size.tile, "width": size.tile}
        image["image_grid_pinpoints"] = _pinpoints(image["image_grid_pinpoints"], size)
        if "patch_size" in content:
            content["patch_size"] = size.patch
            content["num_additional_image_tokens"] = int(size.clip)  # CLIP's class token
            content["vision_feature_select_strategy"] = "default" if size.clip else "full"
        (path / file).write_text(json.dumps(content))

# SPDX-License-Identifier: Apache-2.0
"""A tiny Granite Vision 4: its configuration and its processor, as the published ones are made."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Granite4VisionConfig,
    Granite4VisionProcessor,
    LlavaNextImageProcessor,
    PretrainedConfig,
)

from tests.checkpoints import with_changes
from vllm_spyre_mm.demo import checkpoint_path

MODEL_TYPE = "granite4_vision"

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = 5
"""Of the demo checkpoint's tokenizer."""

SIDE, PATCH = 48, 6
GRID = [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3, 4)]
"""Pinpoints: every grid of tiles up to 3 x 4, a single tile too."""

LEVELS = 6
"""Of :func:`granite4_vision`'s features: two depths of the tower, and four corners."""

DECODER = {
    "model_type": "granite4_vision_text",
    "vocab_size": 520,
    "hidden_size": 128,
    "intermediate_size": 302,
    "num_hidden_layers": LEVELS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}

TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 96,
    "intermediate_size": 203,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_act": "gelu_pytorch_tanh",
}

QFORMER = {
    "model_type": "blip_2_qformer",
    "hidden_size": 96,
    "encoder_hidden_size": 96,
    "num_attention_heads": 3,
    "intermediate_size": 205,
    "num_hidden_layers": 1,
    "cross_attention_frequency": 1,
}

PUBLISHED: dict[str, Any] = {
    "text_config": {
        "model_type": "granite4_vision_text",
        "hidden_size": 2560,
        "intermediate_size": 8192,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625,
        "residual_multiplier": 0.22,
        "logits_scaling": 10.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000000,
        "vocab_size": 100353,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 16,
    },
    "downsample_rate": "4/8",
    "deepstack_layer_map": [[-19, 9], [-13, 6], [-7, 3], [-1, 0]],
    "spatial_vision_layer": -1,
    "spatial_target_layers": [12, 15, 18, 21],
    "image_grid_pinpoints": [[384, 384], [384, 768], [768, 384], [384, 3840], [3840, 384]],
    "image_token_index": 100352,
    "use_image_newline_parameter": True,
    "use_spatial_sampling": True,
    "vision_feature_select_strategy": "full",
}
"""Arguments of the configuration of Granite Vision 4.1 4B, with some of its grids of tiles."""


def granite4_vision(**changes: Any) -> Granite4VisionConfig:
    """Windows of 4 x 4 patches, levels in no order; dotted names change the parts."""
    config = Granite4VisionConfig(
        vision_config=dict(TOWER),
        text_config=dict(DECODER),
        qformer_config=dict(QFORMER),
        image_token_index=IMAGE_TOKEN_ID,
        image_grid_pinpoints=GRID,
        vision_feature_select_strategy="full",
        downsample_rate="2/4",
        deepstack_layer_map=[[-3, 3], [-1, 0]],
        spatial_vision_layer=-1,
        spatial_target_layers=[2, 5, 4, 1],
        tie_word_embeddings=False,
    )
    return with_changes(config, changes)


def save_with_hybrid_decoder(path: Path, checkpoint: Path) -> Path:
    """Write a checkpoint once more, with its decoder as a dense ``granitemoehybrid``.

    Args:
        path: folder for it.
        checkpoint: of :func:`granite4_vision`.
    """
    shutil.copytree(checkpoint, path)
    config = json.loads((path / "config.json").read_text())
    text = config["text_config"]
    config["text_config"] = text | {
        "model_type": "granitemoehybrid",
        "shared_intermediate_size": text["intermediate_size"],
        "intermediate_size": text["hidden_size"],  # of experts, of which there are none
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": ["attention"] * text["num_hidden_layers"],
        "position_embedding_type": "rope",
        "mamba_n_heads": 4,
    }
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".mlp.gate_proj.weight")]:
        layer = name.removesuffix("mlp.gate_proj.weight")
        halves = [tensors.pop(f"{layer}mlp.{part}_proj.weight") for part in ("gate", "up")]
        tensors[f"{layer}shared_mlp.input_linear.weight"] = torch.cat(halves)
        down = tensors.pop(f"{layer}mlp.down_proj.weight")
        tensors[f"{layer}shared_mlp.output_linear.weight"] = down
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def save_granite4_processor(path: Path, config: PretrainedConfig) -> None:
    """Write the tokenizer with its chat template, and the processor."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    side = config.vision_config.image_size
    images = LlavaNextImageProcessor(
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    Granite4VisionProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=IMAGE_TOKEN,
        downsample_rate=config.downsample_rate,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(path)

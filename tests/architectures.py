# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of the architectures, their processors, and random checkpoints of them.

Tokenizer and image processor are the demo checkpoint's where they fit.
"""

from pathlib import Path
from typing import Any

from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    Ministral3Config,
    Mistral3Config,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from tests import granite4_vision, idefics3, llava_onevision, qwen_vl
from tests.checkpoints import Layout, save_random_checkpoint, with_changes
from vllm_spyre_mm.demo import checkpoint_path

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = 5
"""Of the demo checkpoint's tokenizer."""

SIDE, PATCH = 48, 8
GRID = [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3, 4)][1:]
"""Pinpoints: every grid of tiles up to 3 x 4 but a single tile."""

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

PIXTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
PIXTRAL_TOKEN_ID = 420
"""Of the first of them: they are added to the demo checkpoint's 420 tokens."""

DECODER = {
    "vocab_size": 520,
    "hidden_size": 128,
    "intermediate_size": 302,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}

TOWER = {
    "hidden_size": 96,
    "intermediate_size": 203,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**DECODER | changes)


def mistral(**changes: Any) -> MistralConfig:
    return MistralConfig(**DECODER | {"sliding_window": None, "head_dim": 48} | changes)


def ministral3(**changes: Any) -> Ministral3Config:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    return Ministral3Config(**DECODER | {"rope_parameters": rope, "head_dim": 48} | changes)


def qwen2(**changes: Any) -> Qwen2Config:
    return Qwen2Config(**DECODER | changes)


def qwen3(**changes: Any) -> Qwen3Config:
    return Qwen3Config(**DECODER | {"head_dim": 48} | changes)


def granite(**changes: Any) -> GraniteConfig:
    multipliers = {
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    }
    return GraniteConfig(**DECODER | multipliers | changes)


def granite4(**changes: Any) -> GraniteMoeHybridConfig:
    """A dense one; the widths of the experts and of the state-space layers have no part."""
    own = {
        "layer_types": ["full_attention"] * changes.get("num_hidden_layers", 3),
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "rope",
        "shared_intermediate_size": 306,
        "mamba_n_heads": 4,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    }
    return GraniteMoeHybridConfig(**DECODER | own | changes)


def clip(**changes: Any) -> CLIPVisionConfig:
    return CLIPVisionConfig(**TOWER | changes)


def siglip(**changes: Any) -> SiglipVisionConfig:
    return SiglipVisionConfig(**TOWER | {"vision_use_head": False} | changes)


def pixtral(**changes: Any) -> PixtralVisionConfig:
    return PixtralVisionConfig(**TOWER | {"image_size": 2 * SIDE, "hidden_act": "silu"} | changes)


def llava_next(text: PretrainedConfig, **changes: Any) -> LlavaNextConfig:
    """CLIP and a decoder, as most LLaVA-Next checkpoints are; dotted names change the parts."""
    config = LlavaNextConfig(
        vision_config=clip().to_dict(),
        text_config=text.to_dict(),
        image_token_index=IMAGE_TOKEN_ID,
        image_grid_pinpoints=GRID,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return with_changes(config, changes)


def llava(text: PretrainedConfig, **changes: Any) -> LlavaConfig:
    """CLIP and a decoder without tiles; dotted names change the parts."""
    config = LlavaConfig(
        vision_config=clip().to_dict(),
        text_config=text.to_dict(),
        image_token_index=IMAGE_TOKEN_ID,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return with_changes(config, changes)


def mistral3(text: PretrainedConfig, **changes: Any) -> Mistral3Config:
    """Pixtral and a decoder; dotted names change the parts."""
    config = Mistral3Config(
        vision_config=pixtral().to_dict(),
        text_config=text.to_dict(),
        image_token_index=PIXTRAL_TOKEN_ID,
        spatial_merge_size=2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return with_changes(config, changes)


def save_checkpoint(
    path: Path, config: PretrainedConfig, *, seed: int = 0, layout: Layout = "transformers5"
) -> Path:
    """Write a random checkpoint with the processor, or the tokenizer, that goes with it."""
    save_random_checkpoint(path, config, seed=seed, layout=layout, processor=save_processor)
    return path


def save_processor(path: Path, config: PretrainedConfig) -> None:
    """Write what makes a model's inputs."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    if config.model_type == "mistral3":
        tokenizer.add_tokens(list(PIXTRAL_TOKENS), special_tokens=True)
        merge = config.spatial_merge_size
        patch = config.vision_config.patch_size
        PixtralProcessor(
            PixtralImageProcessor(
                size={"longest_edge": config.vision_config.image_size},
                patch_size={"height": patch * merge, "width": patch * merge},
            ),
            tokenizer,
            patch_size=patch,
            spatial_merge_size=merge,
        ).save_pretrained(path)
    elif config.model_type in ("llava", "llava_next"):
        side = config.vision_config.image_size
        images: dict[str, Any] = {
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        }
        texts: dict[str, Any] = {
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "num_additional_image_tokens": int("clip" in config.vision_config.model_type),
            "image_token": IMAGE_TOKEN,
        }
        if config.model_type == "llava":
            LlavaProcessor(CLIPImageProcessor(**images), tokenizer, **texts).save_pretrained(path)
        else:
            images["image_grid_pinpoints"] = config.image_grid_pinpoints
            image_processor = LlavaNextImageProcessor(**images)
            LlavaNextProcessor(image_processor, tokenizer, **texts).save_pretrained(path)
    elif config.model_type in qwen_vl.MODEL_TYPES:
        qwen_vl.save_qwen_processor(path, config)
    elif config.model_type in idefics3.MODEL_TYPES:
        idefics3.save_processor(path, config, tokenizer)
    elif config.model_type == llava_onevision.MODEL_TYPE:
        llava_onevision.save_processor(path, config, tokenizer)
    elif config.model_type == granite4_vision.MODEL_TYPE:
        granite4_vision.save_granite4_processor(path, config)
    else:
        tokenizer.save_pretrained(path)


def blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "white")

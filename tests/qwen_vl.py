# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations and processors of the Qwen-VL family, in the layout of the published ones."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.checkpoints import with_changes
from vllm_spyre_mm.demo import checkpoint_path

TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
FIRST_TOKEN_ID = 420
"""Of the first of them: they are added to the demo checkpoint's 420 tokens."""

IMAGE, VIDEO = (f"<|vision_start|><|{name}_pad|><|vision_end|>" for name in ("image", "video"))
"""What stands for an item in a prompt."""

MODEL_TYPES = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl")

PATCH, MERGE = 8, 2
LEAST_PIXELS, MOST_PIXELS = (4 * MERGE * PATCH) ** 2, (16 * MERGE * PATCH) ** 2

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' or 'video' in part %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

THETA = 30.0
"""So low that a position off by one, on any axis, turns every frequency by an angle that counts."""

DECODER = {  # heads of 128, as the published ones and the card have
    "vocab_size": 520,
    "hidden_size": 256,
    "intermediate_size": 302,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}

THETA = 30.0
"""So low that a step of 1 on any axis turns its frequencies by an angle that counts."""

TOWER = {"depth": 4, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": MERGE}


def token_id(token: str) -> int:
    """Id of one of :data:`TOKENS`."""
    return FIRST_TOKEN_ID + TOKENS.index(token)


def _special_ids() -> dict[str, Any]:
    return {
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "tie_word_embeddings": False,
    }


def qwen3_vl(**changes: Any) -> Qwen3VLConfig:
    """Deepstack from three of four layers; dotted names change the parts."""
    rope = {"rope_type": "default", "rope_theta": THETA, "mrope_section": [24, 20, 20]}
    config = Qwen3VLConfig(
        vision_config={
            **TOWER,
            "hidden_size": 96,
            "intermediate_size": 203,
            "out_hidden_size": 256,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
            "hidden_act": "gelu_pytorch_tanh",
        },
        text_config={
            **DECODER,
            "head_dim": 128,
            "rope_parameters": rope | {"mrope_interleaved": True},
        },
        **_special_ids(),
    )
    return with_changes(config, changes)


def qwen2_5_vl(**changes: Any) -> Qwen2_5_VLConfig:
    """Windows of 4 x 4 patches but in one layer; dotted names change the parts."""
    rope = {"rope_type": "default", "rope_theta": THETA, "mrope_section": [16, 24, 24]}
    config = Qwen2_5_VLConfig(
        vision_config={
            **TOWER,
            "hidden_size": 96,
            "intermediate_size": 204,
            "out_hidden_size": 256,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [2],
            "tokens_per_second": 2,
        },
        text_config={**DECODER, "rope_parameters": rope},
        **_special_ids(),
    )
    return with_changes(config, changes)


def qwen2_vl(**changes: Any) -> Qwen2VLConfig:
    """Dotted names change the parts."""
    rope = {"rope_type": "default", "rope_theta": THETA, "mrope_section": [16, 24, 24]}
    config = Qwen2VLConfig(
        vision_config={**TOWER, "embed_dim": 96, "mlp_ratio": 2, "hidden_size": 256},
        text_config={**DECODER, "rope_parameters": rope},
        **_special_ids(),
    )
    return with_changes(config, changes)


def save_qwen_processor(path: Path, config: PretrainedConfig) -> None:
    """Write the tokenizer, the processors of pictures and videos, and the chat template."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": LEAST_PIXELS, "longest_edge": MOST_PIXELS},
        "patch_size": config.vision_config.patch_size,
        "merge_size": config.vision_config.spatial_merge_size,
        "temporal_patch_size": config.vision_config.temporal_patch_size,
    }
    is_third = config.model_type == "qwen3_vl"
    videos = Qwen3VLVideoProcessor if is_third else Qwen2VLVideoProcessor
    processors = {
        "qwen3_vl": Qwen3VLProcessor,
        "qwen2_5_vl": Qwen2_5_VLProcessor,
        "qwen2_vl": Qwen2VLProcessor,
    }
    frames = sizes["size"] | {"longest_edge": 4 * MOST_PIXELS}
    processors[config.model_type](
        Qwen2VLImageProcessor(**sizes),
        tokenizer,
        videos(**sizes | {"size": frames}),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)

# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA-OneVision: its configuration and its processors, in the published layout."""

from pathlib import Path
from typing import Any

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PretrainedConfig,
)

from tests.checkpoints import with_changes

MODEL_TYPE = "llava_onevision"

IMAGE, VIDEO = "<image>", "<video>"
"""What stands for an item in a prompt."""

IMAGE_TOKEN_ID, VIDEO_TOKEN_ID = 5, 420
"""Of the demo checkpoint's tokenizer, and of a token that is added to its 420."""

CHAT_TEMPLATE = """
{%- for message in messages %}
    {{- '<|' + message.role + '|>\n' }}
    {%- for part in message.content if part.type in ('image', 'video') %}
        {{- '<' + part.type + '>' }}
    {%- endfor %}
    {{- '\n' }}
    {%- for part in message.content if part.type == 'text' %}
        {{- part.text + '\n' }}
    {%- endfor %}
{%- endfor %}
"""
"""Items before the text, as in the published one."""

SIDE, PATCH = 48, 9
"""Five patches on the side of a tile, and pixels to spare: as the published 27 of 14 in 384."""

GRID = [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3, 4) for columns in (1, 2, 3, 4)]
"""Pinpoints: every grid of tiles up to 4 x 4; those of more than 10 tiles are shrunk."""

TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 96,
    "intermediate_size": 203,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "vision_use_head": False,
}


def llava_onevision(text: PretrainedConfig, **changes: Any) -> LlavaOnevisionConfig:
    """SigLIP and a decoder; dotted names change the parts."""
    config = LlavaOnevisionConfig(
        vision_config=dict(TOWER),
        text_config=text.to_dict(),
        image_token_index=IMAGE_TOKEN_ID,
        video_token_index=VIDEO_TOKEN_ID,
        image_grid_pinpoints=GRID,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return with_changes(config, changes)


def save_processor(path: Path, config: Any, tokenizer: Any) -> None:
    """Write what makes a model's inputs: of pictures, of videos and of text."""
    tokenizer.add_tokens([VIDEO], special_tokens=True)
    vision = config.vision_config
    size = {"height": vision.image_size, "width": vision.image_size}
    class_token = int(vision.model_type == "clip_vision_model")
    LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2 + class_token,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)

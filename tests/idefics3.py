# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of Idefics 3 and SmolVLM, and the processors that go with them."""

from pathlib import Path
from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PretrainedConfig,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.checkpoints import with_changes

MODEL_TYPES = ("idefics3", "smolvlm")

TOWER = {
    "hidden_size": 96,
    "intermediate_size": 203,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,  # 8 patches: Transformers finds their positions in bf16 too
    "patch_size": 8,
}

TOKENS = (
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
"""What the published tokenizers have besides the image token."""

FIRST_TOKEN_ID = 420
"""Of the first of them: they are added to the demo checkpoint's 420 tokens."""

TILES = 2
"""Tiles on the longer side of a picture; published processors make 4."""


def idefics3(text: PretrainedConfig, **changes: Any) -> Idefics3Config:
    """SigLIP with pixel shuffle and a decoder; dotted names change the parts."""
    return _config(Idefics3Config, text, changes)


def smolvlm(text: PretrainedConfig, **changes: Any) -> SmolVLMConfig:
    """The same under SmolVLM's names."""
    return _config(SmolVLMConfig, text, changes)


def _config(config_class: Any, text: PretrainedConfig, changes: dict[str, Any]) -> Any:
    config = config_class(
        vision_config=dict(TOWER),
        text_config=text.to_dict(),
        image_token_id=5,  # of the demo checkpoint's tokenizer
        scale_factor=2,
        pad_token_id=1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return with_changes(config, changes)


def save_processor(
    path: Path,
    config: Any,
    tokenizer: Any,
    tiles: int = TILES,
    tokens: tuple[str, ...] = TOKENS,
) -> None:
    """Write what makes a model's inputs.

    Args:
        path: the checkpoint's folder.
        config: of the model.
        tokenizer: gets the tokens that stand beside features.
        tiles: on the longer side of every picture.
        tokens: those; a name that is left out is spelt with the tokenizer's own.
    """
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    side = config.vision_config.image_size
    images = {"size": {"longest_edge": tiles * side}, "max_image_size": {"longest_edge": side}}
    seq_len = (side // config.vision_config.patch_size // config.scale_factor) ** 2
    if config.model_type == "idefics3":
        processor: Any = Idefics3Processor(
            Idefics3ImageProcessor(**images), tokenizer, image_seq_len=seq_len
        )
    else:
        processor = SmolVLMProcessor(
            SmolVLMImageProcessor(**images), tokenizer, SmolVLMVideoProcessor(), seq_len
        )
    processor.save_pretrained(path)

# SPDX-License-Identifier: Apache-2.0
"""The demo checkpoint's model, tokenizer and processor, before training and as files."""

import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    GraniteConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from vllm_spyre_mm.demo.pictures import (
    questions_about_several,
    questions_without_picture,
    random_picture,
    random_questions,
)

TILE, PATCH = 48, 8
"""Side of a picture tile, and of a patch of it, in pixels."""

VOCABULARY = 512
"""Rows of the embedding table; the tokenizer fills most of them."""

END, PAD, IMAGE = "<|endoftext|>", "<|pad|>", "<image>"
SPECIAL_TOKENS = (END, PAD, "<|system|>", "<|user|>", "<|assistant|>", IMAGE)
"""Special tokens; each one's id is its index here."""

SYSTEM_PROMPT = "You answer questions about pictures."

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] if part['type'] in ('image', 'image_url') %}
            {{- '<image>\\n' }}
        {%- endfor %}
        {%- for part in message['content'] if part['type'] == 'text' %}
            {{- part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|endoftext|>\\n' if message['role'] == 'assistant' else '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""


def grid_pinpoints() -> list[list[int]]:
    """(height, width) in pixels of the tile grids that a picture may be spread over."""
    grids = [(1, n) for n in range(1, 6)] + [(n, 1) for n in range(2, 6)]
    grids += [(2, 2), (2, 3), (3, 2), (3, 3), (2, 4), (4, 2)]
    return [[TILE * rows, TILE * columns] for rows, columns in sorted(grids)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the project's own sentences."""
    rng = random.Random("tokenizer")
    sentences = [SYSTEM_PROMPT, "\n"]
    for _ in range(1000):
        pictures = [random_picture(rng, "small") for _ in range(rng.choice((1, 1, 2, 3)))]
        questions = random_questions(rng, pictures, count=99) + questions_without_picture()
        if len(pictures) > 1:
            questions += questions_about_several(pictures)
        for question in questions:
            sentences += [question.text, question.answer]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaNextProcessor:
    """The processor: Granite Vision's settings at the size of this model."""
    square = {"height": TILE, "width": TILE}
    image_processor = LlavaNextImageProcessor(
        size=square,
        crop_size=square,
        image_grid_pinpoints=grid_pinpoints(),
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaNextProcessor(
        image_processor,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=0,
    )


def build_config() -> LlavaNextConfig:
    """The model's configuration: Granite Vision's shape, about a thousandth of its size."""
    vision = SiglipVisionConfig(
        image_size=TILE,
        patch_size=PATCH,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        vision_use_head=False,
    )
    text = GraniteConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        initializer_range=0.05,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 300000.0},
        attention_bias=False,
        mlp_bias=False,
        embedding_multiplier=2.0,
        logits_scaling=4.0,
        residual_multiplier=0.5,
        attention_multiplier=1 / 64,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(END),
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL_TOKENS.index(IMAGE),
        image_grid_pinpoints=grid_pinpoints(),
        image_seq_length=(TILE // PATCH) ** 2,
        vision_feature_layer=[-4, -3, -2, -1],
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        tie_word_embeddings=True,
        use_image_newline_parameter=True,
        architectures=["LlavaNextForConditionalGeneration"],
        bos_token_id=SPECIAL_TOKENS.index(END),
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )


def build_model(config: LlavaNextConfig, seed: int) -> LlavaNextForConditionalGeneration:
    """A randomly initialised model in fp32.

    Granite divides attention scores by the head size and not by its square root, so queries and
    keys start wider; it divides its logits, so the embeddings that yield them start wider too.
    """
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(config)
    std = config.text_config.initializer_range
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=4 * std)
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.normal_(std=2 * std)
            layer.self_attn.k_proj.weight.normal_(std=2 * std)
        model.model.multi_modal_projector.linear_2.bias.zero_()
        model.model.image_newline.normal_(std=4 * std)
    return model


def save(
    model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, folder: Path
) -> None:
    """Write the checkpoint into `folder`, replacing its files one by one."""
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        processor.image_processor.save_pretrained(temporary)
        for file in Path(temporary).iterdir():
            if file.suffix == ".json":
                settings = json.loads(file.read_text())
                if file.name == "tokenizer_config.json":
                    settings = portable_tokenizer_settings(settings)
                file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
            file.chmod(0o644)
            shutil.move(file, folder / file.name)


def portable_tokenizer_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's settings in words that transformers 4 knows as well."""
    settings = {name: value for name, value in settings.items() if name != "backend"}
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return dict(sorted(settings.items()))

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the sizes that are published would load: every tensor has a place of its shape.

Transformers makes the tensors without storage, so nothing of their size is allocated.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Granite4VisionConfig,
    GraniteMoeHybridConfig,
    Idefics3Config,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    MistralConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from tests import granite4_vision
from tests.checkpoints import model_class
from vllm_spyre_mm.model_executor.checkpoint import StoredTensor, WeightFiles
from vllm_spyre_mm.model_executor.loader import LoadOptions, _check, _settle_head
from vllm_spyre_mm.multimodal.mm_mappings import UnsupportedModelError, get_mm_mapping

VICUNA = {
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32064,
}
MISTRAL = {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "sliding_window": None,
    "vocab_size": 32064,
}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_act": "silu",
    "image_size": 1540,
    "patch_size": 14,
}
LLAMA_3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
    "rope_theta": 500000.0,
}


def qwen3_vl(
    width: int, intermediate_size: int, tower: dict[str, Any], **top: Any
) -> Qwen3VLConfig:
    """Qwen3-VL with 36 layers and the tower's sizes, as published."""
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    text = {
        "model_type": "qwen3_vl_text",
        "hidden_size": width,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rope_scaling": rope,
        "rope_theta": 5000000,
        "vocab_size": 151936,
    }
    vision = {"model_type": "qwen3_vl", "out_hidden_size": width, **tower}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **top)


def qwen2_text(width: int, intermediate_size: int, layers: int, heads: int, kv: int) -> Any:
    """The decoder of Qwen2-VL and Qwen2.5-VL; published configurations are flat."""
    return {
        "hidden_size": width,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 128000,
        "max_window_layers": layers,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "rope_theta": 1000000.0,
        "vocab_size": 151936,
    }


QWEN3_VL_SMALL = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
QWEN3_VL_LARGE = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}
QWEN25_VL_TOWER = {"hidden_size": 1280, "intermediate_size": 3420, "in_chans": 3}
SIGLIP_512 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}

SMOL_LLAMA = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}
"""The decoder of Granite Docling and of the small SmolVLM."""


def llava_onevision(
    width: int, intermediate_size: int, layers: int, heads: int, kv: int, **top: Any
) -> LlavaOnevisionConfig:
    """LLaVA-OneVision with SigLIP's 26 layers, 36 grids of tiles and Qwen 2, as published."""
    text = {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
        "vocab_size": 152128 if width > 1000 else 152000,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return LlavaOnevisionConfig(text_config=text, vision_config=vision, **top)


CONFIGS: dict[str, PretrainedConfig] = {
    "LLaVA 1.6 with Mistral 7B": LlavaNextConfig(text_config=dict(MISTRAL)),
    "LLaVA 1.6 with Vicuna 7B": LlavaNextConfig(text_config=dict(VICUNA)),
    "LLaVA 1.6 with Vicuna 13B": LlavaNextConfig(
        text_config=VICUNA
        | {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "num_hidden_layers": 40,
        }
    ),
    "LLaVA-OneVision 0.5B": llava_onevision(896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "LLaVA-OneVision 7B": llava_onevision(3584, 18944, 28, 28, 4),
    "LLaVA 1.5 with Vicuna 7B": LlavaConfig(text_config=dict(VICUNA)),
    "Mistral Small 3.1 24B": Mistral3Config(tie_word_embeddings=False),
    "Ministral 3 8B": Mistral3Config(
        text_config={"model_type": "ministral3"},
        vision_config=dict(PIXTRAL),
        tie_word_embeddings=False,
    ),
    "Granite Docling 258M": Idefics3Config(
        vision_config=dict(SIGLIP_512),
        text_config=SMOL_LLAMA | {"vocab_size": 100352},
        image_token_id=100270,
        scale_factor=4,
        tie_word_embeddings=True,
    ),
    "SmolVLM2 2.2B": SmolVLMConfig(
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 8192,
            "vocab_size": 49280,
        },
        image_token_id=49190,
        scale_factor=3,
    ),
    "SmolVLM2 256M": SmolVLMConfig(
        vision_config=dict(SIGLIP_512),
        text_config=SMOL_LLAMA | {"vocab_size": 49280},
        image_token_id=49190,
        scale_factor=4,
    ),
    "Granite Vision 4.1 4B": Granite4VisionConfig(**granite4_vision.PUBLISHED),
    "Mistral 7B": MistralConfig(**MISTRAL),
    "Llama 3.1 8B": LlamaConfig(
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters=LLAMA_3,
    ),
    "Granite 4.0 micro": GraniteMoeHybridConfig(
        vocab_size=100352,
        hidden_size=2560,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=8,
        shared_intermediate_size=8192,
        layer_types=["full_attention"] * 40,
        num_local_experts=0,
        num_experts_per_tok=0,
        position_embedding_type="rope",
        mamba_n_heads=64,
        tie_word_embeddings=True,
    ),
    "Qwen 2.5 3B": Qwen2Config(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Qwen 3 0.6B": Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "Qwen3-VL 4B": qwen3_vl(2560, 9728, QWEN3_VL_SMALL, tie_word_embeddings=True),
    "Qwen3-VL 8B": qwen3_vl(4096, 12288, QWEN3_VL_LARGE, tie_word_embeddings=False),
    "Qwen2.5-VL 3B": Qwen2_5_VLConfig(
        **qwen2_text(2048, 11008, 36, 16, 2),
        vision_config=QWEN25_VL_TOWER | {"out_hidden_size": 2048},
        tie_word_embeddings=True,
    ),
    "Qwen2.5-VL 7B": Qwen2_5_VLConfig(
        **qwen2_text(3584, 18944, 28, 28, 4),
        vision_config=QWEN25_VL_TOWER | {"out_hidden_size": 3584},
        tie_word_embeddings=False,
    ),
    "Qwen2-VL 2B": Qwen2VLConfig(
        **qwen2_text(1536, 8960, 28, 12, 2),
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "in_chans": 3},
        tie_word_embeddings=True,
    ),
}


NARROW = {"LLaVA-OneVision 0.5B"}
"""Their decoder's heads are 64 wide, and FMS's adapter does not pad them."""

CASES = [(name, False) for name in CONFIGS] + [
    (name, True) for name in CONFIGS if name not in NARROW
]


@pytest.mark.parametrize(("name", "for_card"), CASES)
def test_every_tensor_has_its_place(name: str, for_card: bool) -> None:
    config: Any = CONFIGS[name]
    mapping = get_mm_mapping(config)
    overrides = mapping.load_overrides(for_card)
    with torch.device("meta"):
        stored = model_class(config).from_config(config).state_dict()
    tensors = {
        overrides.rename(stored_name): StoredTensor(
            stored_name, "model.safetensors", tuple(tensor.shape), lambda: torch.zeros(())
        )
        for stored_name, tensor in stored.items()
        if not overrides.is_unused(overrides.rename(stored_name))
    }
    files = WeightFiles(Path(name), ("model.safetensors",), None, (), ())
    overrides = _settle_head(files, tensors, overrides, torch.bfloat16)
    options = LoadOptions(torch.bfloat16, torch.bfloat16, for_card=for_card)
    _check(files, overrides, options, tensors)
    assert len(tensors) > 100
    if name not in NARROW:
        assert mapping.kv_cache_options(for_card=True).head_dim == 128


@pytest.mark.parametrize("name", sorted(NARROW))
def test_narrow_heads_are_refused_for_a_card(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="heads of 64 cannot be padded to the 128"):
        get_mm_mapping(CONFIGS[name]).load_overrides(for_card=True)

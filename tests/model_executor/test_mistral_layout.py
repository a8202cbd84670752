# SPDX-License-Identifier: Apache-2.0
"""Weights in Mistral's own format are the model that the Hugging Face layout gives."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig
from transformers.models.pixtral.modeling_pixtral import (
    PixtralVisionRotaryEmbedding,
    apply_rotary_pos_emb,
)
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.pixtral import apply_rotary_emb_vit, precompute_freqs_cis_2d

from tests import architectures
from tests.e2e.asks import parity_asks
from tests.e2e.engines import engine, greedy
from vllm_spyre_mm.model_executor.checkpoint import CheckpointError, weight_files
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.model_executor.mistral_layout import MistralLayout
from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping

CONFIGS: dict[str, PretrainedConfig] = {
    "mistral3": architectures.mistral3(architectures.mistral(), multimodal_projector_bias=True),
    "ministral3 with pictures": architectures.mistral3(architectures.ministral3()),
    "mistral": architectures.mistral(tie_word_embeddings=True),
    "ministral3": architectures.ministral3(),
}

NAMES = (
    (r"^(language_model\.)?model\.embed_tokens\.", "tok_embeddings."),
    (r"^(language_model\.)?model\.norm\.", "norm."),
    (r"^(language_model\.)?lm_head\.", "output."),
    (r"^(language_model\.)?model\.layers\.", "layers."),
    (r"^vision_tower\.", "vision_encoder."),
    (r"^multi_modal_projector\.norm\.", "pre_mm_projector_norm."),
    (r"^multi_modal_projector\.patch_merger\.", "patch_merger."),
    (r"^multi_modal_projector\.linear_1\.", "vision_language_adapter.w_in."),
    (r"^multi_modal_projector\.linear_2\.", "vision_language_adapter.w_out."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.(self_attn|attention)\.([qkvo])_proj\.", r".attention.w\2."),
    (r"\.(mlp|feed_forward)\.gate_proj\.", ".feed_forward.w1."),
    (r"\.(mlp|feed_forward)\.down_proj\.", ".feed_forward.w2."),
    (r"\.(mlp|feed_forward)\.up_proj\.", ".feed_forward.w3."),
)
"""What the names of a saved model become in Mistral's format."""


def rewrite_in_mistral_format(path: Path, config: Any) -> None:
    """Replace the weights of a checkpoint by the same ones in Mistral's own format."""
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    rewritten = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        width = text.head_dim
        if name.startswith("vision_tower."):
            width = vision.hidden_size // vision.num_attention_heads
        if re.search(r"\.[qk]_proj\.weight$", name):
            # Of each head the first half and the second become neighbours.
            halves = tensor.unflatten(0, (-1, 2, width // 2))
            tensor = torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(tensor.shape)
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        rewritten[name] = tensor.contiguous()
    (path / "model.safetensors").unlink()
    save_file(rewritten, path / "consolidated.safetensors", metadata={"format": "pt"})


@pytest.fixture(params=list(CONFIGS))
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """The same model in the Hugging Face layout and in Mistral's."""
    layout = architectures.save_checkpoint(tmp_path / "hf", CONFIGS[request.param])
    own = Path(shutil.copytree(layout, tmp_path / "own"))
    rewrite_in_mistral_format(own, CONFIGS[request.param])
    return layout, own


def test_every_tensor_is_that_of_the_other_layout(checkpoints: tuple[Path, Path]) -> None:
    options = LoadOptions(torch.float32, torch.float32)
    expected, found = (
        load_model(get_mm_mapping(AutoConfig.from_pretrained(each)), each, options).state_dict()
        for each in checkpoints
    )
    assert weight_files(checkpoints[1]).mistral_format
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("checkpoints", ["mistral3"], indirect=True)
def test_an_engine_gives_the_same_answers(checkpoints: tuple[Path, Path]) -> None:
    prompts = [replace(ask, tag="[IMG]").prompt for ask in parity_asks(4)]
    answers = []
    for each in checkpoints:
        with engine(each, max_num_batched_tokens=128) as llm:
            outputs = llm.generate(prompts, greedy(8), use_tqdm=False)
            answers.append([output.outputs[0] for output in outputs])
    for one, other in zip(*answers, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.mm_embedding is None) == (other.mm_embedding is None)
        assert one.mm_embedding is None or torch.equal(one.mm_embedding, other.mm_embedding)
    assert any(one.mm_embedding is not None for one in answers[0])


# -- beside vLLM, which reads this format by itself -----------------------------------------------


@pytest.mark.parametrize("end", ["wq", "wk", "wv", "wo"])
def test_a_decoder_is_read_as_vllm_reads_it(end: str) -> None:
    config = SimpleNamespace(
        head_dim=6, num_attention_heads=4, num_key_value_heads=2, hidden_size=10
    )
    rows = 6 * (2 if end in ("wk", "wv") else 4)
    stored = torch.randn((10, rows) if end == "wo" else (rows, 10))
    name = f"layers.11.attention.{end}.weight"
    vllm: Any = SimpleNamespace(config=config, mistral_mapping=MistralForCausalLM.mistral_mapping)
    expected_name, expected = MistralForCausalLM.maybe_remap_mistral(vllm, name, stored)
    layout = MistralLayout(head_dim=6, tower_head_dim=None)
    renamed = layout.rename(name)
    assert renamed == f"language_model.{expected_name}"
    assert torch.equal(layout.convert(renamed, stored), expected)


@pytest.mark.parametrize("name", ["tok_embeddings", "norm", "output"])
def test_what_is_beside_the_layers_is_too(name: str) -> None:
    vllm: Any = SimpleNamespace(mistral_mapping=MistralForCausalLM.mistral_mapping)
    expected, _ = MistralForCausalLM.maybe_remap_mistral(vllm, f"{name}.weight", torch.empty(0))
    assert MistralLayout(6, None).rename(f"{name}.weight") == f"language_model.{expected}"


def test_the_tower_attends_as_in_vllm() -> None:
    """Rotated as vLLM rotates Mistral's rows, and as Transformers rotates the converted ones."""
    config = architectures.pixtral()
    heads, rows, columns = config.num_attention_heads, 3, 5
    width = config.hidden_size // heads
    layout = MistralLayout(head_dim=1, tower_head_dim=width)
    stored = [torch.randn(config.hidden_size, config.hidden_size) for _ in range(2)]
    patches = torch.randn(1, rows * columns, config.hidden_size)

    def projected(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
        return [(patches @ matrix.T).unflatten(-1, (heads, width)) for matrix in matrices]

    theta = config.rope_parameters["rope_theta"]
    freqs = precompute_freqs_cis_2d(width, rows, columns, theta).reshape(rows * columns, -1)
    query, key = apply_rotary_emb_vit(*projected(stored), freqs)
    expected = torch.einsum("bqhd,bkhd->bhqk", query, key)

    converted = [
        layout.convert(f"vision_tower.transformer.layers.0.attention.{each}_proj.weight", matrix)
        for each, matrix in zip("qk", stored, strict=True)
    ]
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    cos, sin = PixtralVisionRotaryEmbedding(config)(patches, places)
    query, key = apply_rotary_pos_emb(*projected(converted), cos[None], sin[None], unsqueeze_dim=2)
    found = torch.einsum("bqhd,bkhd->bhqk", query, key)
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-4)


# -- what is refused ------------------------------------------------------------------------------


def test_other_models_have_no_such_format(tmp_path: Path) -> None:
    checkpoint = architectures.save_checkpoint(tmp_path, architectures.llama())
    (checkpoint / "model.safetensors").rename(checkpoint / "consolidated.safetensors")
    mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
    with pytest.raises(CheckpointError, match=r"holds Mistral's own format alone \(consolidated"):
        load_model(mapping, checkpoint, LoadOptions(torch.float32, torch.float32))


@pytest.mark.parametrize("checkpoints", ["mistral"], indirect=True)
def test_a_tensor_that_is_not_known_is_named(checkpoints: tuple[Path, Path]) -> None:
    file = checkpoints[1] / "consolidated.safetensors"
    stored = load_file(file) | {"layers.0.attention.wq.qscale_weight": torch.ones(1)}
    save_file(stored, file, metadata={"format": "pt"})
    mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoints[1]))
    with pytest.raises(CheckpointError, match=r"unexpected: .*qscale_weight"):
        load_model(mapping, checkpoints[1], LoadOptions(torch.float32, torch.float32))

# SPDX-License-Identifier: Apache-2.0
"""Special tokens that the model was never given embeddings for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaProcessor,
    PretrainedConfig,
)
from vllm import LLM
from vllm.exceptions import VLLMValidationError

from tests import architectures
from tests.checkpoints import edit_config, edit_tensors, save_random_checkpoint
from tests.e2e.engines import Ask, engine, greedy
from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping

TAG, TAG_ID, NUM_ROWS = "<picture>", 420, 420
"""The tag and another token are added to the tokenizer, and not to the model."""

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"

ASK = Ask("What is it?", (Image.new("RGB", (60, 40), "red"),), tag=TAG)


def save_processor(path: Path, config: PretrainedConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    assert tokenizer.add_tokens([TAG, "<other>"], special_tokens=True) == 2
    assert tokenizer.convert_tokens_to_ids(TAG) == TAG_ID
    side = config.vision_config.image_size
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    LlavaProcessor(
        CLIPImageProcessor(**sizes),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=TAG,
    ).save_pretrained(path)


@pytest.fixture(scope="module")
def with_row(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has a row for the tag, which it never generates."""
    text = architectures.llama(vocab_size=NUM_ROWS + 4, num_hidden_layers=1)
    config = architectures.llava(text, image_token_index=TAG_ID)
    path = save_random_checkpoint(
        tmp_path_factory.mktemp("with_row"), config, processor=save_processor
    )
    head = load_file(path / "model.safetensors")[HEAD]
    head[NUM_ROWS:] = 0
    edit_tensors(path, {HEAD: head})
    return path


@pytest.fixture(scope="module")
def without_row(with_row: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without it, and with other ids that have none."""
    path = Path(shutil.copytree(with_row, tmp_path_factory.mktemp("without_row") / "copy"))
    tensors = load_file(path / "model.safetensors")
    edit_tensors(path, {name: tensors[name][:NUM_ROWS].clone() for name in (HEAD, EMBEDDING)})
    edit_config(
        path,
        text_config__vocab_size=NUM_ROWS,
        text_config__pad_token_id=NUM_ROWS + 7,
        text_config__bos_token_id=NUM_ROWS + 8,
    )
    generation = {"eos_token_id": [0, NUM_ROWS + 9], "pad_token_id": NUM_ROWS + 7}
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def answer(llm: LLM, **parameters: Any) -> list[int]:
    (output,) = llm.generate(ASK.prompt, greedy(8, **parameters), use_tqdm=False)
    assert TAG_ID in (output.prompt_token_ids or [])
    return list(output.outputs[0].token_ids)


def test_an_image_token_needs_no_row(with_row: Path, without_row: Path):
    with engine(with_row) as llm:
        expected = answer(llm)
    with engine(without_row) as llm:
        assert answer(llm) == expected
        # vLLM looks for the logits of stop tokens and of bad words.
        assert answer(llm, min_tokens=4)[:4] == expected[:4]
        assert answer(llm, bad_words=[TAG]) == expected
        with pytest.raises(VLLMValidationError, match=f"has token {TAG_ID + 1} at position 1"):
            llm.generate({"prompt_token_ids": [7, TAG_ID + 1]}, greedy(), use_tqdm=False)
        assert answer(llm) == expected


def test_text_tokens_of_a_placeholder_need_rows(tmp_path: Path):
    text = architectures.mistral(vocab_size=421, num_hidden_layers=1)
    checkpoint = architectures.save_checkpoint(tmp_path, architectures.mistral3(text))
    with (
        pytest.raises(ValueError, match=r"puts token 421 beside .* embedding has 421 rows"),
        engine(checkpoint),
    ):
        pass


DECODERS = {
    "granite": architectures.granite(num_hidden_layers=1),
    "granitemoehybrid": architectures.granite4(num_hidden_layers=1),
    "llama": architectures.llama(num_hidden_layers=1),
    "mistral": architectures.mistral(num_hidden_layers=1),
    "ministral3": architectures.ministral3(num_hidden_layers=1),
    "qwen2": architectures.qwen2(num_hidden_layers=1),
    "qwen3": architectures.qwen3(num_hidden_layers=1),
}


@pytest.mark.parametrize("name", list(DECODERS))
def test_a_padding_token_needs_no_row(tmp_path: Path, name: str):
    checkpoint = architectures.save_checkpoint(tmp_path, DECODERS[name])

    def state(pad_token_id: int | None) -> dict[str, torch.Tensor]:
        edit_config(checkpoint, pad_token_id=pad_token_id)
        mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
        options = LoadOptions(torch.float32, torch.float32)
        return load_model(mapping, checkpoint, options).state_dict()

    expected = state(1)
    for pad_token_id in (520, 32001, -1, -521, None):
        for key, tensor in state(pad_token_id).items():
            assert torch.equal(tensor, expected[key])

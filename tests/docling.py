# SPDX-License-Identifier: Apache-2.0
"""A tiny Idefics 3 that writes DocTags: the same document for every page.

Its decoder's layers hand on what they are given, so that the token behind each token is known: the
tags are special tokens, as those of Granite Docling are. The tower is random as in other tests.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PretrainedConfig

from tests import architectures, idefics3
from tests.checkpoints import edit_tensors, save_random_checkpoint
from vllm_spyre_mm.demo import checkpoint_path

TILES = 4
"""On the longer side of a page, as in Granite Docling."""

TEXT = "a red circle"
TAGS = (
    "<doctag>",
    "<text>",
    "<loc_20>",
    "<loc_21>",
    "<loc_480>",
    "<loc_40>",
    "</text>",
    "</doctag>",
)
DOCUMENT = "".join([*TAGS[:6], TEXT, *TAGS[6:]])
"""What is written for a page."""

END = "<|endoftext|>"
"""The demo checkpoint's end of a sequence, which comes behind the document."""

BEFORE = "\n"
"""What the demo checkpoint's chat template ends with."""


def save_checkpoint(path: Path) -> Path:
    """Write the checkpoint with its processor."""
    config = idefics3.idefics3(architectures.llama())
    save_random_checkpoint(path, config, processor=_save_processor)
    tokenizer = AutoTokenizer.from_pretrained(path)
    chain = tokenizer(f"{BEFORE}{DOCUMENT}{END}", add_special_tokens=False).input_ids
    assert len(chain) == len(set(chain)), "each token says which one comes next"
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["model.text_model.embed_tokens.weight"]
    head = torch.zeros_like(embedding)
    head[chain[1:]] = embedding[chain[:-1]]
    last = (".o_proj.weight", ".down_proj.weight")  # of a layer: what it adds to its input
    changes: dict[str, torch.Tensor | None] = {
        name: torch.zeros_like(tensor)
        for name, tensor in tensors.items()
        if name.startswith("model.text_model.") and name.endswith(last)
    }
    norm = "model.text_model.norm.weight"
    edit_tensors(path, changes | {"lm_head.weight": head, norm: torch.ones_like(tensors[norm])})
    return path


def _save_processor(path: Path, config: PretrainedConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    tokens = (*idefics3.TOKENS, *TAGS)
    idefics3.save_processor(path, config, tokenizer, TILES, tokens)

# SPDX-License-Identifier: Apache-2.0
"""Makes small random checkpoints in the Hugging Face layout, from Transformers configurations.

The weights are scaled so that greedy answers vary from token to token and their margins are far
above rounding; the tokenizer, the processor and the chat template are the demo checkpoint's.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaNextConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from vllm_spyre_mm.demo import checkpoint_path

Layout = Literal["transformers4", "transformers4.52", "transformers5"]


def llava_next_config(**changes: Any) -> LlavaNextConfig:
    """A tiny SigLIP + Granite configuration; dotted names change the parts.

    Based on the demo checkpoint's, so that its tokenizer and processor fit.
    """
    config = AutoConfig.from_pretrained(checkpoint_path())
    values = {
        "vision_config.num_hidden_layers": 4,
        "vision_feature_layer": -2,
        "text_config.num_hidden_layers": 3,
        "text_config.num_attention_heads": 4,
        "text_config.num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "text_config.tie_word_embeddings": False,
        **changes,
    }
    return with_changes(config, values)


def with_changes(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of a configuration; dotted names (or ``__``) reach into its parts."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        owner, _, attribute = name.replace("__", ".").rpartition(".")
        setattr(getattr(config, owner) if owner else config, attribute, value)
    return config


def model_class(config: PretrainedConfig) -> type[Any]:
    """Transformers' auto class for a configuration."""
    if hasattr(config, "vision_config"):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def save_random_checkpoint(
    path: Path,
    config: PretrainedConfig,
    *,
    seed: int = 0,
    layout: Layout = "transformers5",
    dtype: torch.dtype = torch.float32,
    processor: "Callable[[Path, PretrainedConfig], None] | None" = None,
) -> Path:
    """Write a checkpoint with random weights, with the demo's processor unless one is given.

    Every matrix keeps the scale of what it is multiplied with, so that no layer is drowned by the
    residual stream and the logits spread over several units.
    """
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config).from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                gain = 1.0 if "embed" in name else 1.5
                parameter.normal_(0, gain * fan_in**-0.5 if "embed_tokens" not in name else 0.3)
            elif "norm" in name.lower() and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.1)
        model.lm_head.weight.normal_(0, 8.0 * config.get_text_config().hidden_size ** -0.5)
    model.to(dtype).save_pretrained(path)
    if processor is None:
        copy_processor(path)
    else:
        processor(path, config)
    if layout != "transformers5":
        rename_tensors(path, layout)
    return path


def copy_processor(path: Path) -> None:
    """Put the demo checkpoint's tokenizer, processor and chat template beside the weights."""
    for file in checkpoint_path().iterdir():
        if file.name not in ("config.json", "model.safetensors", "generation_config.json"):
            shutil.copy(file, path / file.name)


def rename_tensors(path: Path, layout: Layout) -> None:
    """Give the tensors of a checkpoint the names that an older Transformers wrote."""

    file = path / "model.safetensors"
    stored = load_file(file)
    is_pixtral = "vision_tower.patch_conv.weight" in stored

    def renamed(name: str) -> str:
        if name.startswith(("model.connector.", "model.text_model.", "model.vision_model.")):
            return name  # Idefics 3's have not changed
        if name.startswith("vision_tower.") and not is_pixtral:
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        if layout == "transformers4":
            return name
        if name.startswith("language_model.lm_head."):
            return name.removeprefix("language_model.")
        return "model." + name.replace("language_model.model.", "language_model.", 1)

    tensors = {renamed(name): tensor for name, tensor in stored.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def edit_tensors(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of a checkpoint, or drop those whose new value is None."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def shard(path: Path, num_files: int) -> list[Path]:
    """Split a checkpoint's weights over several files with an index, as large models are stored."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names, files = sorted(tensors), []
    size = math.ceil(len(names) / num_files)
    for i in range(num_files):
        part = {name: tensors[name] for name in names[i * size : (i + 1) * size]}
        file = path / f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        save_file(part, file, metadata={"format": "pt"})
        files.append(file)
    write_index(path, {name: files[i // size].name for i, name in enumerate(names)})
    return files


def write_index(path: Path, weight_map: Mapping[str, str]) -> None:
    """Say which tensor of a checkpoint is in which file."""
    index = {"metadata": {}, "weight_map": dict(weight_map)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(path: Path, **changes: Any) -> None:
    """Change entries of a checkpoint's ``config.json``; dots (``__``) reach into its parts."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    for name, value in changes.items():
        *owners, attribute = name.split("__")
        part = config
        for owner in owners:
            part = part[owner]
        part[attribute] = value
    file.write_text(json.dumps(config))

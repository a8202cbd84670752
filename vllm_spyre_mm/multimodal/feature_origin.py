# SPDX-License-Identifier: Apache-2.0
"""What features depend on beside their picture, as one text: features of two engines may stand for
each other only if theirs are equal."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.transformers_utils.repo_utils import get_hf_file_bytes

from vllm_spyre_mm.model_executor.checkpoint import find_checkpoint, open_checkpoint, weight_files
from vllm_spyre_mm.model_executor.mistral_layout import layout_of
from vllm_spyre_mm.model_executor.parts import split_parts
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils, get_mm_mapping
from vllm_spyre_mm.upstream.contract import DISTRIBUTION

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

COMPUTES = (DISTRIBUTION, "vllm", "transformers", "torch", "torchvision", "ibm-fms")
"""Distributions that process pictures and encode them."""

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Files of a checkpoint that say how pictures and videos are processed."""


def origin_of(vllm_config: "VllmConfig", encoder_dtype: str) -> str:
    """The origin of an engine's features, a hexadecimal digest.

    It depends on the content of the encoder's weights, of the configuration and of the files
    that say how pictures are processed; on the model's name and revision, the encoder's dtype, the
    engine's ``mm_processor_kwargs``, and the releases of what processes and encodes.

    Args:
        vllm_config: of the engine.
        encoder_dtype: name of the encoder's dtype.
    """
    model_config = vllm_config.model_config
    mapping = get_mm_mapping(model_config.hf_config)
    multimodal = model_config.multimodal_config
    assert multimodal is not None, "the model takes images"
    named = {
        "releases": {name: _release(name) for name in COMPUTES},
        "model": model_config.model,
        "revision": model_config.revision,
        "config": model_config.hf_config.to_dict(),
        "dtype": encoder_dtype,
        "mm_processor_kwargs": multimodal.mm_processor_kwargs,
    }
    digest = hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode())
    _add_processor(digest, model_config)
    if vllm_config.load_config.load_format == "dummy":
        digest.update(f"random weights, seed {model_config.seed}".encode())
    else:
        folder = find_checkpoint(model_config, vllm_config.load_config)
        _add_weights(digest, folder, mapping)
    return digest.hexdigest()


def _release(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _add_processor(digest: "hashlib._Hash", model_config: "ModelConfig") -> None:
    """Add the files that the processor was made of.

    They are in the model's folder, or in the hub's cache: ``--download-dir`` is for weights alone.
    """
    for name in PROCESSOR_FILES:
        content = get_hf_file_bytes(name, model_config.model, model_config.revision or "main")
        if content is not None:
            digest.update(name.encode() + content)


def _add_weights(digest: "hashlib._Hash", folder: Path, mapping: MMUtils) -> None:
    """Add the tensors of the encoder, one at a time."""
    files, overrides = weight_files(folder), mapping.load_overrides()
    tensors = open_checkpoint(files, *layout_of(files, overrides))
    encoder, _ = split_parts(tensors, overrides.encoder_modules)
    for name, stored in sorted(encoder.items()):
        tensor = stored.read().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(content)

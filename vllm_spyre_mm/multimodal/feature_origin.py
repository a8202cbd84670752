# SPDX-License-Identifier: Apache-2.0
"""What features depend on beside their picture, as one text: features of two engines may stand for
each other only if theirs are equal."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_spyre_mm.model_executor.checkpoint import find_checkpoint, open_checkpoint, weight_files
from vllm_spyre_mm.model_executor.mistral_layout import layout_of
from vllm_spyre_mm.model_executor.parts import split_parts
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils, get_mm_mapping
from vllm_spyre_mm.upstream.contract import DISTRIBUTION

if TYPE_CHECKING:
    from vllm.config import VllmConfig

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
    engine's ``mm_processor_kwargs``, and this package's release.

    Args:
        vllm_config: of the engine.
        encoder_dtype: name of the encoder's dtype.
    """
    model_config = vllm_config.model_config
    mapping = get_mm_mapping(model_config.hf_config)
    multimodal = model_config.multimodal_config
    assert multimodal is not None, "the model takes images"
    named = {
        "release": importlib.metadata.version(DISTRIBUTION),
        "model": model_config.model,
        "revision": model_config.revision,
        "config": model_config.hf_config.to_dict(),
        "dtype": encoder_dtype,
        "mm_processor_kwargs": multimodal.mm_processor_kwargs,
    }
    digest = hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode())
    if vllm_config.load_config.load_format == "dummy":
        digest.update(f"random weights, seed {model_config.seed}".encode())
    else:
        folder = find_checkpoint(model_config, vllm_config.load_config)
        _add_processor(digest, folder)
        _add_weights(digest, folder, mapping)
    return digest.hexdigest()


def _add_processor(digest: "hashlib._Hash", folder: Path) -> None:
    for name in PROCESSOR_FILES:
        if (folder / name).exists():
            digest.update(name.encode() + (folder / name).read_bytes())


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

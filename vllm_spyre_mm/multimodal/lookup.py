# SPDX-License-Identifier: Apache-2.0
"""Finds a model's mapping by its name, for tools that start no engine; no weights are read."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_spyre_mm.multimodal.mm_mappings import MMUtils


def look_up(model: str) -> "tuple[Any, MMUtils]":
    """A model's configuration and the mapping that serves it.

    Raises:
        OSError: there is no configuration.
        ValueError: no mapping serves the model; the message says why.
    """
    from vllm_spyre_mm.compat import ensure_torchvision_importable

    ensure_torchvision_importable()  # Transformers looks for it
    from transformers import AutoConfig

    from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping

    if not Path(model).exists() and (model.startswith((".", "/", "~")) or model.endswith(".json")):
        raise FileNotFoundError("no such file or folder")
    config = AutoConfig.from_pretrained(model)
    return config, get_mm_mapping(config)

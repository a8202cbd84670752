# SPDX-License-Identifier: Apache-2.0
"""Checks of one checkpoint: its configuration, its files and its tensors.

Only headers are read, no weights: what a start would refuse after minutes is found in seconds.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_spyre_mm.doctor.finding import Finding
from vllm_spyre_mm.doctor.host import gib
from vllm_spyre_mm.doctor.probe import probe

FETCH = "fetch the checkpoint again, every file of it"
CONVERT = "convert them: model.save_pretrained(..., safe_serialization=True) of transformers"


def configuration(folder: Path) -> Iterator[Finding]:
    """Whether a mapping serves the model."""
    if not folder.is_dir():
        do = "give the folder of a checkpoint; `vllm-spyre-mm models NAME` looks at a hub's model"
        yield Finding("model", "error", f"{folder} is no folder", do)
        return
    if not (folder / "config.json").is_file():
        yield Finding("model", "error", f"{folder} has no config.json", FETCH)
        return
    try:
        mapping = _mapping(folder)
    except (OSError, ValueError) as error:
        do = "see docs/supported-models.md, or docs/adding-a-model.md"
        yield Finding("model", "error", str(error), do)
        return
    yield Finding("model", "ok", f"served by {type(mapping).__name__} ({mapping.summary})")


def processor(folder: Path) -> Iterator[Finding]:
    """Whether the tokenizer or processor of the checkpoint loads."""
    from transformers import AutoProcessor, AutoTokenizer

    mapping = _mapping(folder)
    auto = AutoTokenizer if mapping.image_token_id is None else AutoProcessor
    try:
        found = auto.from_pretrained(folder)
    except (OSError, ValueError) as error:
        said = f"the tokenizer or processor does not load: {str(error).splitlines()[0]}"
        yield Finding("processor", "error", said, FETCH)
        return
    if getattr(found, "chat_template", None) is None:
        do = "give prompts with the model's own tags, or start with --chat-template FILE"
        yield Finding("processor", "warning", "there is no chat template", do)
    else:
        yield Finding("processor", "ok", f"{type(found).__name__}, with a chat template")


def files(folder: Path) -> Iterator[Finding]:
    """Whether the weights are there: every file that the index names, none of them cut short."""
    from safetensors import SafetensorError, safe_open

    from vllm_spyre_mm.model_executor.checkpoint import CheckpointError, weight_files

    try:
        found = weight_files(folder)
    except CheckpointError as error:
        pickled = not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin"))
        yield Finding("files", "error", str(error), CONVERT if pickled else FETCH)
        return
    faults = []
    for name in found.absent:
        assert found.indexed is not None, "the index names what is absent"
        count, total = len(found.indexed[name]), sum(map(len, found.indexed.values()))
        faults.append(f"{name}, with {count} of {total} tensors, is missing")
    stored = [folder / name for name in found.read]
    for file in stored:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            pointer = file.stat().st_size < 1024 and file.read_bytes().startswith(b"version http")
            why = "is a pointer of git LFS" if pointer else f"cannot be read: {error}"
            faults.append(f"{file.name} {why}")
    for fault in faults:
        yield Finding("files", "error", fault, FETCH)
    if not faults:
        size = gib(sum(file.stat().st_size for file in stored))
        yield Finding("files", "ok", f"{len(stored)} files of weights, {size} GiB")


def weights(folder: Path, *, dummy: bool = False) -> Iterator[Finding]:
    """Whether the tensors are exactly those of the model, and fit into memory.

    Args:
        folder: of the checkpoint.
        dummy: the weights are made up, and no file of them is looked at.
    """
    import torch
    from vllm.config import CacheConfig

    from vllm_spyre_mm.config import DEFAULT_MAX_MODEL_LEN
    from vllm_spyre_mm.host_memory import host_memory
    from vllm_spyre_mm.model_executor.checkpoint import CheckpointError
    from vllm_spyre_mm.model_executor.dummy_weights import dummy_shapes
    from vllm_spyre_mm.model_executor.kv_cache import ACTIVATION_RESERVE
    from vllm_spyre_mm.model_executor.loader import LoadOptions, check_checkpoint

    mapping = _mapping(folder)
    dtype = torch.bfloat16 if probe("host")["bf16"] else torch.float32
    try:
        if dummy:
            elements = sum(map(math.prod, dummy_shapes(mapping.load_overrides()).values()))
        else:
            elements = check_checkpoint(mapping, folder, LoadOptions(dtype, dtype))
    except CheckpointError as error:
        yield Finding("weights", "error", str(error), FETCH)
        return
    options = mapping.kv_cache_options()
    length = min(mapping.text_config.max_position_embeddings, DEFAULT_MAX_MODEL_LEN)
    sequence_bytes = options.token_bytes(dtype) * length
    needed = elements * dtype.itemsize + sequence_bytes + ACTIVATION_RESERVE
    free = host_memory().free(CacheConfig.gpu_memory_utilization)
    origin = "made up at random" if dummy else "every one accounted for"
    said = (
        f"{elements / 1e6:.0f} M elements, {origin}; {gib(needed)} GiB for the "
        f"model, one sequence of {length} tokens and activations, of {gib(free)} GiB free"
    )
    if needed > free:
        do = "free memory, lower --max-model-len, or take a smaller model"
        yield Finding("weights", "error", said, do)
    else:
        yield Finding("weights", "ok", said)


def _mapping(folder: Path) -> Any:
    from vllm_spyre_mm.multimodal.lookup import look_up

    return look_up(str(folder))[1]

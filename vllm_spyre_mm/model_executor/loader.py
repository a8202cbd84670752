# SPDX-License-Identifier: Apache-2.0
"""Loads a model: FMS's classes and adapters, with a check that every tensor is used and present.

FMS only warns about tensors that it cannot place, and leaves parameters without a tensor
uninitialised. Here the shapes of the whole checkpoint go through FMS's adapter before any data is
read, and a checkpoint that does not give exactly the model's parameters is refused.
"""

import copy
import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import ProcessGroup
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.model_executor.checkpoint import (
    CheckpointError,
    StoredTensor,
    WeightFiles,
    check_complete,
    check_initialised,
    open_checkpoint,
    weight_files,
)
from vllm_spyre_mm.model_executor.mistral_layout import layout_of
from vllm_spyre_mm.model_executor.parts import ModelPart, leave_out, loaded_tensors
from vllm_spyre_mm.model_executor.spec import FmsModel, LoadOverrides, ModelSpec

logger = get_logger(__name__)

SOURCE = "hf"
"""FMS's name for checkpoints in the Hugging Face layout."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        decoder_dtype: dtype of the decoder and of the text embeddings.
        encoder_dtype: dtype of the vision encoder and its projector.
        for_card: build the decoder as the card's compiler requires: heads of 128 and separate
            projections. On a CPU fused projections are faster.
        group: process group for tensor parallelism, None without.
        part: what is loaded of the model; what is not is None, and its tensors are not read.
    """

    decoder_dtype: torch.dtype
    encoder_dtype: torch.dtype
    for_card: bool = False
    group: ProcessGroup | None = None
    part: ModelPart = ModelPart.WHOLE


def load_model(mapping: ModelSpec, checkpoint: Path, options: LoadOptions) -> FmsModel:
    """Build an FMS model and fill it from a checkpoint.

    Args:
        mapping: of the model's architecture.
        checkpoint: local folder in the Hugging Face layout.
        options: dtypes and placement.

    Returns:
        The model on the CPU, in evaluation mode, without gradients.

    Raises:
        CheckpointError: a tensor is missing, unexpected, wrongly shaped or not finite.
    """
    files = weight_files(checkpoint)
    overrides, encoder, decoder = _checked_tensors(
        mapping.load_overrides(options.for_card), files, options
    )
    model = build_model(overrides, options.decoder_dtype, options.group)
    leave_out(model, overrides.encoder_modules, options.part)
    for part, dtype in ((encoder, options.encoder_dtype), (decoder, options.decoder_dtype)):
        reads = {name: tensor.read for name, tensor in part.items()}
        fill_model(model, overrides.architecture, reads, dtype, options.group)
    model.post_init()  # ties the head and computes the RoPE tables, now that there is storage
    check_initialised(files, model)
    return model.eval().requires_grad_(False)


def check_checkpoint(mapping: ModelSpec, checkpoint: Path, options: LoadOptions) -> int:
    """Check a checkpoint as :func:`load_model` does, without reading weights.

    Returns:
        The number of elements that would be loaded.

    Raises:
        CheckpointError: a tensor is missing, unexpected or wrongly shaped.
    """
    overrides = mapping.load_overrides(options.for_card)
    _, *parts = _checked_tensors(overrides, weight_files(checkpoint), options)
    return sum(math.prod(tensor.shape) for part in parts for tensor in part.values())


def _checked_tensors(
    overrides: LoadOverrides, files: WeightFiles, options: LoadOptions
) -> tuple[LoadOverrides, dict[str, StoredTensor], dict[str, StoredTensor]]:
    """List a checkpoint's tensors, and check that they are exactly the model's.

    Returns:
        The overrides, with the LM head tied or not as in the checkpoint; the encoder's tensors; the
        decoder's tensors.

    Raises:
        CheckpointError: a tensor is missing, unexpected or wrongly shaped.
    """
    tensors = {
        name: tensor
        for name, tensor in open_checkpoint(files, *layout_of(files, overrides)).items()
        if not overrides.is_unused(name)
    }
    if options.part.has_decoder:
        overrides = _settle_head(files, tensors, overrides, options.decoder_dtype)
    encoder, decoder = loaded_tensors(tensors, overrides.encoder_modules, options.part)
    _check(files, overrides, options, {**encoder, **decoder})
    return overrides, encoder, decoder


def build_model(
    overrides: LoadOverrides, dtype: torch.dtype, group: ProcessGroup | None
) -> FmsModel:
    """Build the model on the meta device.

    FMS's ``get_model`` would initialise it first, which recurses without end for its SigLIP.
    """
    from fms.distributed.strategy import NoOpStrategy, TensorParallelStrategy

    strategy = NoOpStrategy if group is None else TensorParallelStrategy(group)
    with set_default_torch_dtype(dtype), torch.device("meta"):
        model = overrides.model_class(
            copy.deepcopy(overrides.config), distributed_strategy=strategy
        )
    return model


def _settle_head(
    files: WeightFiles,
    tensors: dict[str, StoredTensor],
    overrides: LoadOverrides,
    dtype: torch.dtype,
) -> LoadOverrides:
    """Tie the LM head to the embedding, or not, as Transformers does with the same checkpoint.

    Where the configuration ties them: a stored head that equals the embedding is removed from
    ``tensors``, because FMS would let it replace the embedding; one that differs in ``dtype`` is
    kept untied; one that is stored alone is taken for the embedding.

    Raises:
        CheckpointError: there is no head, and the configuration does not tie it.
    """
    head = overrides.head
    stored, embedding = tensors.get(head.name), tensors.get(head.embedding)
    if not head.tied:
        if stored is None and embedding is not None:
            raise CheckpointError(
                f"the checkpoint in {files.folder} cannot be served; missing: {head.name}, and the "
                f"configuration does not tie the head to the embedding: {head.settings}; {files}"
            )
        return overrides
    if stored is None:
        return overrides
    if embedding is None:
        tensors[head.embedding] = tensors.pop(head.name)
    elif torch.equal(stored.read().to(dtype), embedding.read().to(dtype)):
        del tensors[head.name]
    else:
        logger.warning(
            "%s ties the head to the embedding (%s), but holds two that differ: %s and %s. Both "
            "are used, as Transformers does.",
            files.folder,
            head.settings,
            stored,
            embedding,
        )
        untied = dataclasses.replace(head, tied=False)
        return dataclasses.replace(overrides, config=head.untied_config, head=untied)
    return overrides


def _check(
    files: WeightFiles,
    overrides: LoadOverrides,
    options: LoadOptions,
    tensors: Mapping[str, StoredTensor],
) -> None:
    """Run the shapes through FMS's adapter and compare the result with the unsharded model."""
    from fms.utils.serialization import get_adapted

    # Separate projections have names of their own, so that an error names the missing one.
    config = dataclasses.replace(overrides.config, fused_weights=False)
    whole = build_model(dataclasses.replace(overrides, config=config), options.decoder_dtype, None)
    adapted: dict[str, torch.Tensor] = {}
    for group in _layers(tensors):
        with torch.device("meta"):
            shapes = {name: torch.empty(tensors[name].shape) for name in group}
            try:
                adapted |= get_adapted(
                    overrides.architecture, SOURCE, shapes, {"model_config": whole.config}
                )
            except (RuntimeError, LookupError, AssertionError) as error:
                stored = ", ".join(f"{name} {tensors[name].shape}" for name in sorted(group))
                raise CheckpointError(
                    f"the checkpoint in {files.folder} cannot be served; these tensors do not "
                    f"form a layer ({error}): {stored}; {files}"
                ) from error
    expected = whole.state_dict()
    if overrides.head.tied:
        del expected[head_parameter(overrides, whole)]
    encoder, decoder = loaded_tensors(expected, overrides.encoder_modules, options.part)
    check_complete(files, adapted, encoder | decoder)


def head_parameter(overrides: LoadOverrides, model: FmsModel) -> str:
    """FMS's name for the weight of the LM head."""
    from fms.utils.serialization import get_adapted

    stored = {overrides.head.name: torch.empty(0)}
    config = {"model_config": model.config}
    (name,) = get_adapted(overrides.architecture, SOURCE, stored, config)
    return name


def _layers(tensors: Mapping[str, StoredTensor]) -> list[list[str]]:
    """Group names by layer: FMS's adapter needs the parts of a fused projection together."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        layer = re.match(r"(.*?\.\d+)\.", name)
        groups[layer[1] if layer else name].append(name)
    return list(groups.values())


def fill_model(
    model: FmsModel,
    architecture: str,
    tensors: Mapping[str, Callable[[], torch.Tensor]],
    dtype: torch.dtype,
    group: ProcessGroup | None,
    source: str = SOURCE,
) -> None:
    """Read tensors into the model, layer by layer, so that few are in memory twice.

    Args:
        model: on the meta device.
        architecture: FMS's name for it.
        tensors: what reads each of them, by the name that ``source`` has for it.
        dtype: of the parameters.
        group: for tensor parallelism, None without.
        source: FMS's name for the layout of the tensors.
    """
    from fms.utils.serialization import LazySafetensorsDict, load_state_dict_into_model

    lazy = LazySafetensorsDict()
    lazy.update(tensors)  # read when FMS comes to each
    load_state_dict_into_model(
        model=model,
        state_dict=lazy,
        architecture=architecture,
        source=source,
        dtype=dtype,
        distributed_strategy="tp" if group is not None else None,
        rank=group.rank() if group is not None else 0,
    )

# SPDX-License-Identifier: Apache-2.0
"""Random weights in place of a checkpoint's (``load_format=dummy``): what a model takes in memory
and in time is known before its weights are fetched."""

import functools
import math
import zlib

import torch
from torch import nn

from vllm_spyre_mm.model_executor.loader import (
    LoadOptions,
    build_model,
    fill_model,
    head_parameter,
)
from vllm_spyre_mm.model_executor.parts import leave_out, loaded_tensors
from vllm_spyre_mm.model_executor.spec import FmsModel, LoadOverrides, ModelSpec

AS_FMS = ""
"""A layout that FMS has no adapter for: tensors have the names and shapes of its parameters."""


def load_dummy_model(mapping: ModelSpec, options: LoadOptions, seed: int) -> FmsModel:
    """Build an FMS model with random weights; nothing is read.

    With tensor parallelism each rank has its part of the same weights.

    Args:
        mapping: of the model's architecture.
        options: dtypes, placement and what is loaded of the model.
        seed: the same one gives the same weights.

    Returns:
        The model on the CPU, in evaluation mode, without gradients.
    """
    overrides = mapping.load_overrides(options.for_card)
    model = build_model(overrides, options.decoder_dtype, options.group)
    leave_out(model, overrides.encoder_modules, options.part)
    tensors = {
        name: functools.partial(_random, name, shape, options.decoder_dtype, seed)
        for name, shape in dummy_shapes(overrides).items()
    }
    encoder, decoder = loaded_tensors(tensors, overrides.encoder_modules, options.part)
    for part, dtype in ((encoder, options.encoder_dtype), (decoder, options.decoder_dtype)):
        fill_model(model, overrides.architecture, part, dtype, options.group, source=AS_FMS)
    model.post_init()
    return model.eval().requires_grad_(False)


def dummy_shapes(overrides: LoadOverrides) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors before they are divided among ranks, by FMS's names.

    A head that the configuration ties to the embedding is not among them.
    """
    whole: nn.Module = build_model(overrides, torch.float32, None)
    state = whole.state_dict()
    if overrides.head.tied:
        del state[head_parameter(overrides, whole)]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _random(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A tensor that keeps the scale of what it is applied to, so that every result is finite.

    Matrices and kernels of convolutions are uniform with the variance of one over their inputs;
    norms are ones and biases zeros.
    """
    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    bound = math.sqrt(3 / math.prod(shape[1:]))
    return torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)

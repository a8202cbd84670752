# SPDX-License-Identifier: Apache-2.0
"""The vision encoder on the host, with either backend of the decoder.

It runs uncompiled where PyTorch lacks an internal that compilation depends on.
"""

from torch import nn

from vllm_spyre_mm.model_executor.cpu.compile import compile_encoder_blocks
from vllm_spyre_mm.model_executor.cpu.linear import replace_linears
from vllm_spyre_mm.model_executor.cpu.torch_internals import why_not_compiled
from vllm_spyre_mm.model_executor.spec import FmsModel, LoadOverrides


def place_encoder(model: FmsModel, overrides: LoadOverrides, *, compiled: bool) -> None:
    """Replace the linear layers of the encoder's modules, in place.

    Args:
        model: with an encoder, or without.
        overrides: of its mapping; they name the encoder's modules.
        compiled: whether its blocks are to be compiled.
    """
    compiled = compiled and why_not_compiled() is None
    for name in overrides.encoder_modules:
        part = getattr(model, name)
        if isinstance(part, nn.Module):  # some are parameters
            replace_linears(part, compiled=compiled)


def compile_encoder(model: FmsModel, overrides: LoadOverrides) -> None:
    """Compile the repeated blocks of the encoder, in place, where that is possible."""
    if why_not_compiled() is None:
        compile_encoder_blocks(overrides.encoder_blocks(model))

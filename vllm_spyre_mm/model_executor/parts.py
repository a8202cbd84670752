# SPDX-License-Identifier: Apache-2.0
"""The parts of a model, its vision encoder and its decoder, either of which can be loaded alone."""

import dataclasses
from collections.abc import Mapping
from enum import Enum, auto
from typing import TypeVar

from torch import nn

from vllm_spyre_mm.model_executor.spec import FmsModel, LoadOverrides

T = TypeVar("T")


class ModelPart(Enum):
    """What is loaded of a model.

    Attributes:
        WHOLE: all of it.
        ENCODER: the vision encoder: its tower, its projector and what else makes features.
        DECODER: the decoder, with its embedding and its head.
    """

    WHOLE = auto()
    ENCODER = auto()
    DECODER = auto()

    @property
    def has_encoder(self) -> bool:
        """Whether the vision encoder is loaded."""
        return self is not ModelPart.DECODER

    @property
    def has_decoder(self) -> bool:
        """Whether the decoder is loaded."""
        return self is not ModelPart.ENCODER


def split_parts(
    tensors: Mapping[str, T], encoder_modules: tuple[str, ...]
) -> tuple[dict[str, T], dict[str, T]]:
    """Separate the encoder's tensors from the decoder's: each part has its dtype, and FMS's adapter
    pads a decoder's heads only if it is given nothing else."""
    encoder = {
        name: tensor
        for name, tensor in tensors.items()
        if any(name == module or name.startswith(f"{module}.") for module in encoder_modules)
    }
    return encoder, {name: tensors[name] for name in tensors.keys() - encoder.keys()}


def loaded_tensors(
    tensors: Mapping[str, T], encoder_modules: tuple[str, ...], part: ModelPart
) -> tuple[dict[str, T], dict[str, T]]:
    """The encoder's tensors and the decoder's, as :func:`split_parts` separates them; those of a
    part that is left out are not among them."""
    encoder, decoder = split_parts(tensors, encoder_modules)
    return encoder if part.has_encoder else {}, decoder if part.has_decoder else {}


def leave_out(model: FmsModel, encoder_modules: tuple[str, ...], part: ModelPart) -> None:
    """Set what is not loaded of a model to None, in place.

    Args:
        model: on the meta device.
        encoder_modules: names of the modules and parameters of its vision encoder.
        part: what is loaded.
    """
    children = [*model.named_children(), *model.named_parameters(recurse=False)]
    for name, _ in children:
        if not (part.has_encoder if name in encoder_modules else part.has_decoder):
            setattr(model, name, None)


def overrides_of(overrides: LoadOverrides, part: ModelPart) -> LoadOverrides:
    """The overrides of a model of which a part is loaded: the other has no modules and no blocks.

    Args:
        overrides: of the whole model.
        part: what is loaded.
    """
    if part is ModelPart.ENCODER:
        return dataclasses.replace(overrides, decoder_blocks=_no_blocks)
    if part is ModelPart.DECODER:
        return dataclasses.replace(overrides, encoder_modules=(), encoder_blocks=_no_blocks)
    return overrides


def _no_blocks(_: FmsModel) -> nn.ModuleList:
    return nn.ModuleList()

# SPDX-License-Identifier: Apache-2.0
"""Deepstack: features of several depths of the vision tower, each added before a decoder layer.

A level is a tensor like the hidden states, zero where the prompt has text. The layers stay what
they are, with their names and their compiled code: a hook adds the level to what comes in.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn


class Deepstack:
    """Adds levels to the inputs of decoder layers, in the passes that have levels.

    Args:
        layers: of the decoder; called with their hidden states as ``x``.
        numbers: for each level the index of the layer before whose input it is added.

    Attributes:
        levels: of the pass that is running, ``(batch, length, hidden_size)`` each, in the decoder's
            dtype; empty for a pass without. Set by the model before each pass.
    """

    def __init__(self, layers: nn.ModuleList, numbers: Sequence[int]) -> None:
        self.levels: tuple[torch.Tensor, ...] = ()
        for level, number in enumerate(numbers):
            layers[number].register_forward_pre_hook(partial(self._add, level), with_kwargs=True)

    def _add(
        self, level: int, layer: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.levels:
            return None
        return args, {**inputs, "x": inputs["x"] + self.levels[level]}

# SPDX-License-Identifier: Apache-2.0
"""The compiled linear layer of bf16 on AMX or AVX-512, for a weight that is rearranged once.

The weight lies in the order in which it is multiplied: a prompt's products and a tower's are faster
than oneDNN's, and a decode reads it at the memory's pace. What follows the layer, a
GELU, the gate of a gated unit or the sum with a residual, is computed beside the products, before
anything is rounded; a norm before it, where rows are packed for the products.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_spyre_mm.model_executor.cpu.kernels.kernel import FLOAT, POINTER, SIZE, Kernel
from vllm_spyre_mm.model_executor.cpu.memory import empty_result, huge_pages

BLOCK = 32
"""Outputs of a panel, and inputs of a step."""

GELU_TANH, SILU_GATED = "gelu_tanh", "silu_gated"
"""What may follow: ``F.gelu(..., approximate="tanh")``; ``F.silu(gate) * value``."""

ACTIVATIONS = (None, GELU_TANH, SILU_GATED)
"""In the kernel's order, where the sum with a residual comes after them."""


KERNEL = Kernel(
    "tiled_linear",
    ("avx512", "avx512_bf16", "amx"),
    (torch.bfloat16,),
    (*[POINTER] * 7, *[SIZE] * 8, *[FLOAT] * 2),
)


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm of the rows that a layer multiplies.

    Attributes:
        weight: bf16 ``(width,)``.
        bias: the same, or None.
        centered: subtract the mean of a row first.
        epsilon: added to the mean of the squares.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    centered: bool
    epsilon: float


def tile_weight(weight: torch.Tensor) -> torch.Tensor:
    """Rearrange ``(outputs, width)``, bf16.

    Returns:
        ``(panels, steps, 2, 16, 16, 2)``: panels of 32 outputs, steps of 32 inputs; then halves of
        the outputs, pairs of the inputs, outputs, and the inputs of a pair. Zeros fill what is left
        of the last panel and the last step.
    """
    outputs, width = weight.shape
    whole = F.pad(weight, (0, -width % BLOCK, 0, -outputs % BLOCK))
    pairs = whole.view(torch.int32).view(-(-outputs // BLOCK), 2, 16, -(-width // BLOCK), 16)
    tiles = pairs.permute(0, 3, 1, 4, 2)
    tiled = huge_pages().empty(tiles.shape, torch.int32).copy_(tiles)
    return tiled.view(torch.bfloat16).unflatten(-1, (16, 2))


def interleave_gates(gates_and_values: torch.Tensor) -> torch.Tensor:
    """Put gates beside what they gate, as the kernel takes the weight or the bias of a gated unit.

    Args:
        gates_and_values: ``(2 * outputs, ...)``, the gates first.

    Returns:
        ``(32 * panels, ...)``: 16 gates, their 16 values, and so on; zeros fill the last.
    """
    gates, values = (
        torch.cat([part, part.new_zeros(-len(part) % 16, *part.shape[1:])]).unflatten(0, (-1, 16))
        for part in gates_and_values.chunk(2)
    )
    return torch.stack([gates, values], dim=1).flatten(0, 2)


def is_tiled(weight: torch.Tensor) -> bool:
    """Whether :func:`tile_weight` made it."""
    return weight.dim() == 6


def empty_rows(x: torch.Tensor, outputs: int) -> torch.Tensor:
    """Room for ``(..., outputs)`` of ``x`` ``(..., width)``, each row in cache lines of its own.

    A kernel that writes 32 outputs of a row would else write to two lines, and come back to each.
    """
    room = -(-outputs // BLOCK) * BLOCK
    rows = empty_result(x, (*x.shape[:-1], room))
    return rows if room == outputs else rows[..., :outputs]


def tiled_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outputs: int,
    activation: str | None = None,
    *,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """``(..., width)`` to ``(..., outputs)``, of :func:`empty_rows`.

    Args:
        x: bf16.
        weight: of :func:`tile_weight`.
        bias: ``(outputs,)``, bf16.
        outputs: of the layer; the weight may hold more.
        activation: one of :data:`ACTIVATIONS`. For ``SILU_GATED`` the weight and the bias have
            been through :func:`interleave_gates`, and ``outputs`` counts what is gated.
        norm: of each row of ``x`` before; the width is a multiple of :data:`BLOCK`.
        residual: ``(..., outputs)``, bf16, added to ``scale`` times the outputs; there is no
            activation then.
        scale: of the outputs.
    """
    width, out = x.shape[-1], empty_rows(x, outputs)
    x, rows, x_row = _in_rows(x)
    residual_row = 0
    if residual is not None:
        residual, _, residual_row = _in_rows(residual)
    KERNEL.load()(
        x.data_ptr(),
        *(None if part is None else part.data_ptr() for part in _parts(norm)),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        outputs,
        x_row,
        residual_row,
        -(-outputs // BLOCK) * BLOCK,
        ACTIVATIONS.index(activation) if residual is None else len(ACTIVATIONS),
        norm is not None and norm.centered,
        0.0 if norm is None else norm.epsilon,
        scale,
    )
    return out


def _in_rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Numbers that lie in rows, how many rows, and the numbers from one to the next."""
    if x.is_contiguous():  # asked first: a decode comes here forty times a step
        return x, x.numel() // x.shape[-1], x.shape[-1]
    x = x.reshape(-1, x.shape[-1])
    x = x if x.stride(1) == 1 else x.contiguous()
    return x, x.shape[0], x.stride(0)


def _parts(norm: Norm | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if norm is None else (norm.weight, norm.bias)

# SPDX-License-Identifier: Apache-2.0
"""The kernel for a bf16 linear layer on AMX or AVX-512, with a prepacked (tiled) weight.

For prompts and towers the GEMM is faster than oneDNN's, and a decode's GEMV reads the weight at the
memory's bandwidth. A GELU, SwiGLU's gating or a residual is fused as an epilogue, on fp32 sums that
are not rounded yet; a norm before the layer is fused into the packing of the rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_spyre_mm.model_executor.cpu.kernels.kernel import FLOAT, POINTER, SIZE, Kernel
from vllm_spyre_mm.model_executor.cpu.memory import empty_result, huge_pages

BLOCK = 32
"""Outputs in a panel of the weight, and inputs in a step along its depth."""

GELU_TANH, SWIGLU = "gelu_tanh", "swiglu"
"""Fused activations: ``F.gelu(..., approximate="tanh")``; ``F.silu(gate) * value``."""

ACTIVATIONS = (None, GELU_TANH, SWIGLU)
"""Activations in the order of the kernel's ``Epilogue``, where ``RESIDUAL`` comes last."""

KERNEL = Kernel(
    "tiled_linear",
    ("avx512", "avx512_bf16", "amx"),
    (torch.bfloat16,),
    (*[POINTER] * 7, *[SIZE] * 8, *[FLOAT] * 2),
)


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm of a linear layer's input rows: RMSNorm, or LayerNorm if centered.

    Attributes:
        weight: bf16 ``(width,)``.
        bias: bf16 ``(width,)``, or None.
        centered: subtract the mean of a row first.
        epsilon: added to the mean of the squares.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    centered: bool
    epsilon: float


def tile_weight(weight: torch.Tensor) -> torch.Tensor:
    """Pack a bf16 weight ``(outputs, width)`` into tiles.

    Returns:
        ``(panels, steps, 2, 16, 16, 2)``: panels of 32 outputs, steps of 32 inputs; then halves of
        the outputs, pairs of the inputs, outputs, and the inputs of a pair. The last
        panel and the last step are padded with zeros.
    """
    outputs, width = weight.shape
    whole = F.pad(weight, (0, -width % BLOCK, 0, -outputs % BLOCK))
    pairs = whole.view(torch.int32).view(-(-outputs // BLOCK), 2, 16, -(-width // BLOCK), 16)
    tiles = pairs.permute(0, 3, 1, 4, 2)
    tiled = huge_pages().empty(tiles.shape, torch.int32).copy_(tiles)
    return tiled.view(torch.bfloat16).unflatten(-1, (16, 2))


def interleave_gates(gates_and_values: torch.Tensor) -> torch.Tensor:
    """Interleave SwiGLU's gates and values, as the kernel takes its weight and bias.

    Args:
        gates_and_values: ``(2 * outputs, ...)``, the gates first.

    Returns:
        ``(32 * panels, ...)``: 16 gates, their 16 values, and so on, padded with zeros.
    """
    gates, values = (
        torch.cat([part, part.new_zeros(-len(part) % 16, *part.shape[1:])]).unflatten(0, (-1, 16))
        for part in gates_and_values.chunk(2)
    )
    return torch.stack([gates, values], dim=1).flatten(0, 2)


def is_tiled(weight: torch.Tensor) -> bool:
    """Whether a weight was packed by :func:`tile_weight`."""
    return weight.dim() == 6


def empty_rows(x: torch.Tensor, outputs: int) -> torch.Tensor:
    """An empty result ``(..., outputs)`` for ``x`` ``(..., width)``, rows aligned to cache lines.

    Otherwise a block of 32 outputs of a row would straddle two cache lines, each written twice.
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
    """Linear layer from ``(..., width)`` to ``(..., outputs)``, allocated by :func:`empty_rows`.

    Args:
        x: bf16.
        weight: of :func:`tile_weight`.
        bias: ``(outputs,)``, bf16.
        outputs: of the layer; the weight may hold more.
        activation: one of :data:`ACTIVATIONS`. For ``SWIGLU`` the weight and the bias have
            been through :func:`interleave_gates`, and ``outputs`` counts gated values.
        norm: applied to each row of ``x`` first; the width is a multiple of :data:`BLOCK`.
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
    """``x`` as a matrix with contiguous rows, the number of rows, and their stride in elements."""
    if x.is_contiguous():  # the fast path: a decode comes here forty times a step
        return x, x.numel() // x.shape[-1], x.shape[-1]
    x = x.reshape(-1, x.shape[-1])
    x = x if x.stride(1) == 1 else x.contiguous()
    return x, x.shape[0], x.stride(0)


def _parts(norm: Norm | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if norm is None else (norm.weight, norm.bias)

# SPDX-License-Identifier: Apache-2.0
"""What the machine can do: multiply bf16 matrices, and read memory."""

from dataclasses import dataclass

import torch

from benchmarks.measure import interleaved


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best of several runs.

    Attributes:
        gemm_flops: floating-point operations a second of a bf16 product, weights packed.
        read_bytes: bytes a second that all cores read together.
    """

    gemm_flops: float
    read_bytes: float


def measure_ceilings(repeats: int) -> Ceilings:
    """Products of the encoder's largest shape, and sums over more than any cache holds."""
    rows, width, out = 2 * 729, 1152, 4304
    x = torch.randn(rows, width).bfloat16()
    weights = [
        torch.ops.mkldnn._reorder_linear_weight(torch.randn(out, width).bfloat16(), None)
        for _ in range(8)
    ]
    memory = torch.ones(1 << 28)  # 1 GiB

    def multiply() -> None:
        for weight in weights:
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    timings = interleaved({"gemm": multiply, "read": memory.sum}, repeats)
    flops = 2 * rows * width * out * len(weights)
    return Ceilings(
        gemm_flops=flops / min(timings["gemm"].seconds),
        read_bytes=memory.nbytes / min(timings["read"].seconds),
    )

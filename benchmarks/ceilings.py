# SPDX-License-Identifier: Apache-2.0
"""What the machine can do: multiply bf16 matrices, and read memory."""

from dataclasses import dataclass

import torch

from benchmarks.measure import interleaved


class CeilingProduct:
    """The fastest bf16 product that PyTorch has, oneDNN's of packed weights, to be timed.

    Attributes:
        flops: of a call.
    """

    def __init__(self) -> None:
        rows, width, out = 2 * 729, 1152, 4304
        self.flops = 2.0 * rows * width * out * 8
        self._x = torch.randn(rows, width).bfloat16()
        self._weights = [
            torch.ops.mkldnn._reorder_linear_weight(torch.randn(out, width).bfloat16(), None)
            for _ in range(8)
        ]

    def __call__(self) -> None:
        for weight in self._weights:
            torch.ops.mkldnn._linear_pointwise(self._x, weight, None, "none", [], "")


class CeilingRead:
    """A sum over more than any cache holds, to be timed.

    Attributes:
        nbytes: that a call reads.
    """

    def __init__(self) -> None:
        self._memory = torch.ones(1 << 28)
        self.nbytes = self._memory.nbytes

    def __call__(self) -> None:
        self._memory.sum()


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
    product, read = CeilingProduct(), CeilingRead()
    timings = interleaved({"gemm": product, "read": read}, repeats)
    return Ceilings(
        gemm_flops=product.flops / min(timings["gemm"].seconds),
        read_bytes=read.nbytes / min(timings["read"].seconds),
    )

# SPDX-License-Identifier: Apache-2.0
"""Operators that are defined once, for computing and for shapes alone."""

import torch

from vllm_spyre_mm.model_executor.cpu.operators import define_operator, shape_of_first


def _negative(x: torch.Tensor, factor: float) -> torch.Tensor:
    return -factor * x


def test_an_operator_is_defined_once_and_computes_by_device() -> None:
    for _ in range(2):  # PyTorch would refuse the second
        define_operator(
            "test_negative(Tensor x, float factor) -> Tensor", CPU=_negative, Meta=shape_of_first
        )
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert torch.equal(torch.ops.spyre_mm.test_negative(x, 2.0), -2 * x)
    shape = torch.ops.spyre_mm.test_negative(x.to("meta"), 2.0)
    assert (shape.device.type, shape.shape, shape.dtype) == ("meta", x.shape, x.dtype)

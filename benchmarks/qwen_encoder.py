# SPDX-License-Identifier: Apache-2.0
"""The vision towers of Qwen-VL at published sizes, beside the machine's bf16 ceiling."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm.utils.torch_utils import set_default_torch_dtype

from benchmarks.ceilings import CeilingProduct
from benchmarks.encoder import beside_ceiling
from benchmarks.measure import Row
from vllm_spyre_mm.model_executor.cpu.compile import cpu_compile_context
from vllm_spyre_mm.model_executor.cpu.encoder import compile_encoder, place_encoder
from vllm_spyre_mm.model_executor.models.qwen_vision import QwenVision
from vllm_spyre_mm.model_executor.models.qwen_vision_config import QwenVisionConfig

QWEN3_VL_4B = QwenVisionConfig()

QWEN25_VL_3B = QwenVisionConfig(
    hidden_size=1280,
    intermediate_size=3420,
    nlayers=32,
    out_hidden_size=2048,
    patch_size=14,
    hidden_act="silu",
    gated=True,
    rms_norm=True,
    patch_bias=False,
    num_position_embeddings=0,
    deepstack_layers=(),
    window=4,
    full_attention_layers=(7, 15, 23, 31),
)

TOWERS = {"Qwen3-VL 4B": (QWEN3_VL_4B, 64), "Qwen2.5-VL 3B": (QWEN25_VL_3B, 74)}
"""Configuration by model, and the patches on a side of a picture of 1024 x 1024."""


def qwen_encoder_rows(quick: bool) -> Iterator[Row]:
    """A picture of a megapixel, and (in the full run) four, in each tower with random weights."""
    product = CeilingProduct()
    for model, (config, side) in TOWERS.items():
        tower = compiled_tower(config)
        with torch.inference_mode():
            with cpu_compile_context():
                tower(torch.randn(4, config.patch_values), torch.tensor([(1, 2, 2)]))
            for pictures in (1,) if quick else (1, 4):
                grids = torch.tensor([(1, side, side)] * pictures)
                pixels = torch.randn(pictures * side**2, config.patch_values)
                yield beside_ceiling(
                    f"{model}, {pictures} picture{'s' if pictures > 1 else ''} of 1 megapixel",
                    lambda tower=tower, pixels=pixels, grids=grids: tower(pixels, grids),
                    pictures * _flops(config, side),
                    product,
                    repeats=3 if quick else 9,
                    section="vision tower of Qwen-VL",
                )


def compiled_tower(config: QwenVisionConfig) -> QwenVision:
    """A tower as the CPU's backend places it."""
    with set_default_torch_dtype(torch.bfloat16):
        tower = QwenVision(config).eval().requires_grad_(False)
    for name, parameter in tower.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, 0.02)
    model: Any = nn.Module()
    model.vision_tower = tower
    overrides: Any = SimpleNamespace(
        encoder_modules=("vision_tower",), encoder_blocks=lambda model: model.vision_tower.blocks
    )
    place_encoder(model, overrides, compiled=True)
    compile_encoder(model, overrides)
    return tower


def _flops(config: QwenVisionConfig, side: int) -> float:
    """Of a square picture's products of matrices: projections, attention, patches and mergers."""
    patches, width = side**2, config.hidden_size
    projections = 3 if config.gated else 2
    layer = 2 * patches * (4 * width + projections * config.intermediate_size) * width
    full = len(config.full_attention_layers) if config.window else config.nlayers
    in_frame = 4 * patches**2 * width
    in_windows = (
        4
        * width
        * sum(
            (rows * columns) ** 2 for rows in _cuts(config, side) for columns in _cuts(config, side)
        )
    )
    square = config.spatial_merge_size**2
    merger = 2 * patches * width * (square * width + config.out_hidden_size)
    return float(
        config.nlayers * layer
        + full * in_frame
        + (config.nlayers - full) * in_windows
        + 2 * patches * config.patch_values * width
        + (1 + len(config.deepstack_layers)) * merger
    )


def _cuts(config: QwenVisionConfig, side: int) -> list[int]:
    """Patches on the sides of the windows along a side of a picture."""
    window = config.window * config.spatial_merge_size or side
    return [min(window, side - first) for first in range(0, side, window)]

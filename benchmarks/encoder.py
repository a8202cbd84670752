# SPDX-License-Identifier: Apache-2.0
"""The vision tower at Granite Vision 3.x's size, beside the machine's bf16 ceiling."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.ceilings import CeilingProduct
from benchmarks.checkpoints import TOWER
from benchmarks.measure import Figure, Row, compare, constant, interleaved
from vllm_spyre_mm.config import CardSettings
from vllm_spyre_mm.model_executor.backend import StepSizes
from vllm_spyre_mm.model_executor.backends import make_backend
from vllm_spyre_mm.model_executor.cpu.compile import cpu_compile_context
from vllm_spyre_mm.model_executor.cpu.memory import mmap_threshold
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.model_executor.model import SpyreModel
from vllm_spyre_mm.model_executor.pieces import whole
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils, get_mm_mapping

GRIDS = {2: (1, 1), 5: (2, 2), 10: (3, 3)}
"""Rows and columns of tiles, by tiles altogether; LLaVA-Next has a base tile besides the grid."""

PATCHES = (TOWER.tile // TOWER.patch) ** 2


def encoder_rows(checkpoint: Path, quick: bool) -> Iterator[Row]:
    """One tile, and images of 2, 5 and 10; compiled and (in the full run) as eager FMS.

    Each in turn with the product that is the ceiling, in memory that is set up as the worker's.
    """
    mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
    compiled = compiled_model(checkpoint)
    eager = load_model(mapping, checkpoint, LoadOptions(torch.bfloat16, torch.bfloat16))
    product = CeilingProduct()
    with torch.inference_mode():
        with cpu_compile_context():
            compiled.encode(image_of(2))
        for tiles in (2, 5) if quick else (1, *GRIDS):
            if tiles == 1:  # LLaVA-Next makes two of the smallest picture
                pixels = torch.randn(1, 3, TOWER.tile, TOWER.tile)
                cases = {
                    "ours": lambda pixels=pixels: _encode_tile(compiled.fms_model, pixels),
                    "eager FMS": lambda pixels=pixels: _encode_tile(eager, pixels),
                }
            else:
                image = image_of(tiles)
                cases = {
                    "ours": lambda image=image: compiled.encode(image),
                    "eager FMS": lambda image=image: mapping.compute_features(eager, image),
                }
            if quick:
                del cases["eager FMS"]
            flops = _flops(compiled, tiles)
            for name, case in cases.items():
                repeats = 15 if name == "ours" and not quick else 5
                title = f"{tiles} tile{'s' if tiles > 1 else ''}, {name}"
                yield beside_ceiling(title, case, flops, product, repeats)


def compiled_model(checkpoint: Path) -> SpyreModel[MMUtils]:
    """A model as the worker has it, in bf16; its graphs are compiled at their first runs."""
    mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
    sizes = StepSizes(
        block_size=64,
        chunk_size=1536,
        context_len=4608,
        max_batch_tkv=4608,
        max_num_seqs=1,
        max_blocks=72,
    )
    with mmap_threshold():
        fms_model = load_model(mapping, checkpoint, LoadOptions(torch.bfloat16, torch.bfloat16))
        model = SpyreModel(fms_model, mapping, make_backend("inductor", sizes, CardSettings()))
    model.compile()
    return model


def beside_ceiling(
    name: str,
    case: Callable[[], Any],
    flops: float,
    product: CeilingProduct,
    repeats: int,
    section: str = "vision tower",
) -> Row:
    """A row of a tower's time beside that of its products at the ceiling, measured in turn.

    Args:
        name: of the row.
        case: runs the tower.
        flops: of its products.
        product: whose pace is the ceiling.
        repeats: of the measurement.
        section: of the row.
    """
    timings = interleaved({"tower": case, "ceiling": product}, repeats)
    part = flops / product.flops
    return compare(
        section,
        name,
        timings["tower"],
        constant([part * seconds for seconds in timings["ceiling"].seconds]),
        "all operations at the bf16 ceiling",
        Figure.SHARE,
        paired=True,
    )


def _encode_tile(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    features: torch.Tensor = model.multi_modal_projector(whole(model.select_hidden_states(pixels)))
    return features


def image_of(tiles: int) -> dict[str, Any]:
    """The processor's output for a picture of so many tiles."""
    rows, columns = GRIDS[tiles]
    return {
        "pixel_values": torch.randn(1, tiles, 3, TOWER.tile, TOWER.tile),
        "image_sizes": torch.tensor([[rows * TOWER.tile, columns * TOWER.tile]]),
    }


def _flops(model: SpyreModel, tiles: int) -> float:
    """Of the products of matrices: projections, attention, patches and the projector."""
    width, inner, _, _ = TOWER.vision
    layers = len(model.fms_model.vision_tower.base_model.encoder.layers)
    hidden = TOWER.text[0]
    rows = tiles * PATCHES
    layer = 2 * rows * (4 * width * width + 2 * width * inner) + 4 * rows * PATCHES * width
    patches = 2 * rows * width * 3 * TOWER.patch**2
    projector = 2 * rows * (len(TOWER.feature_layers) * width * hidden + hidden * hidden)
    return float(layers * layer + patches + projector)

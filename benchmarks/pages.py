# SPDX-License-Identifier: Apache-2.0
"""The vision tower of Granite Docling on a page of 13 tiles, beside the machine's bf16 ceiling."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, Idefics3Config, Idefics3ForConditionalGeneration

from benchmarks.ceilings import CeilingProduct
from benchmarks.encoder import beside_ceiling, compiled_model
from benchmarks.measure import Row
from vllm_spyre_mm.model_executor.cpu.compile import cpu_compile_context
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping

TILES, SIDE, PATCH, SCALE = 13, 512, 16, 4
"""A page of 210 x 297 mm: four rows of three tiles, and the global one."""

PAGE = f"a page of {TILES} tiles of {SIDE}"
"""The name of its rows, before whose tower it is."""

WIDTH, INNER, LAYERS, HIDDEN = 768, 3072, 12, 576


def page_rows(quick: bool) -> Iterator[Row]:
    """A page, compiled and (in the full run) as eager FMS, in turn with the ceiling's product."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _checkpoint(Path(folder))
        mapping = get_mm_mapping(AutoConfig.from_pretrained(checkpoint))
        compiled = compiled_model(checkpoint)
        eager = load_model(mapping, checkpoint, LoadOptions(torch.bfloat16, torch.bfloat16))
    page = {
        "pixel_values": torch.randn(TILES, 3, SIDE, SIDE),
        "pixel_attention_mask": torch.ones(TILES, SIDE, SIDE, dtype=torch.int64),
        "num_patches": torch.tensor([TILES]),
    }
    cases = {
        "ours": lambda: compiled.encode(page),
        "eager FMS": lambda: mapping.compute_features(eager, page),
    }
    if quick:
        del cases["eager FMS"]
    product = CeilingProduct()
    with torch.inference_mode():
        with cpu_compile_context():
            compiled.encode(page)
        for name, case in cases.items():
            repeats = 15 if name == "ours" and not quick else 5
            yield beside_ceiling(f"{PAGE}, {name}", case, _flops(), product, repeats)


def _checkpoint(folder: Path) -> Path:
    """Random weights of Granite Docling's tower, with one layer of its decoder."""
    config = Idefics3Config(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": WIDTH // 64,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": 1536,
            "num_hidden_layers": 1,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 1024,
        },
        image_token_id=5,
        pad_token_id=1,
        scale_factor=SCALE,
    )
    torch.manual_seed(0)
    Idefics3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _flops() -> float:
    """Of the products of matrices: projections, attention, patches and the projector."""
    patches = (SIDE // PATCH) ** 2
    rows = TILES * patches
    layer = 2 * rows * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER) + 4 * rows * patches * WIDTH
    embeddings = 2 * rows * WIDTH * 3 * PATCH**2
    projector = 2 * rows * WIDTH * HIDDEN  # a feature for scale ** 2 rows of as many widths
    return float(LAYERS * layer + embeddings + projector)

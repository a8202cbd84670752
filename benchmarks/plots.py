# SPDX-License-Identifier: Apache-2.0
"""Plots of the results: one for each section, and the overview that the README shows."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import Machine
from benchmarks.measure import Row
from benchmarks.report import KERNELS, UNITS
from benchmarks.results import Results, rows_of

OVERVIEW = {
    "4 requests, a picture each: beside *": "4 requests, a picture each",
    "beside others: one request, *": "one request",
    "beside others: vision tower, *": "CLIP's tower",
    "the same picture again: *": "the same picture again: first token",
}
"""Rows of the overview, which are speed-ups, and what is said of each."""


def write_plots(folder: Path, results: Results) -> None:
    """Write ``*.png``; says so if matplotlib is not there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: pip install 'vllm-spyre-mm[bench]'")
        return
    rows = {machine: rows_of(parts) for machine, parts in results.items()}
    sections = dict.fromkeys(row.section for each in rows.values() for row in each)
    sections.pop(KERNELS, None)  # a table: their times differ by orders of magnitude
    for section in sections:
        of_section = {
            machine: [row for row in each if row.section == section]
            for machine, each in rows.items()
        }
        shown = {machine: each for machine, each in of_section.items() if each}
        heights = [0.8 + 0.55 * len(each) for each in shown.values()]
        figure = Figure(figsize=(9, 0.6 + sum(heights)), layout="constrained")
        panels = figure.subplots(len(shown), squeeze=False, height_ratios=heights)[:, 0]
        for axes, (machine, each) in zip(panels, shown.items(), strict=True):
            _plot_rows(axes, machine, each)
        figure.suptitle(f"{section}: measured (blue), reference (grey), measured over reference")
        figure.savefig(folder / f"{section.replace(' ', '-').replace(',', '')}.png", dpi=110)
    _write_overview(folder, rows, Figure)


def _plot_rows(axes: Any, machine: Machine, rows: Sequence[Row]) -> None:
    """Bars of what was measured on one machine, beside their references."""
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
    axes.set_xlabel(next((UNITS[unit] for unit in UNITS if unit in rows[0].name), "seconds"))
    axes.set_title(machine.title, fontsize=9)


def _write_overview(folder: Path, rows: dict[Machine, list[Row]], figure_class: Any) -> None:
    """How many times as fast as each reference, on every machine."""
    ratios: dict[str, dict[Machine, float]] = {}
    for machine, each in rows.items():
        for row in each:
            label = _overview_label(row)
            if label is not None and row.ratio is not None:
                ratios.setdefault(label, {})[machine] = 1 / row.ratio
    if not ratios:
        return
    figure = figure_class(figsize=(9, 1.6 + 0.55 * len(ratios)), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for number, machine in enumerate(rows):
        places = [place for place, label in enumerate(ratios) if machine in ratios[label]]
        lengths = [ratios[label][machine] for label in ratios if machine in ratios[label]]
        shifted = [place + (number - (len(rows) - 1) / 2) * width for place in places]
        bars = axes.barh(shifted, lengths, width * 0.9, label=machine.title)
        axes.bar_label(bars, fmt=" %.1f", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("times as fast (1: the same)")
    figure.legend(loc="outside lower center", fontsize=8)
    figure.savefig(folder / "overview.png", dpi=110)


def _overview_label(row: Row) -> str | None:
    for pattern, label in OVERVIEW.items():
        if fnmatch.fnmatchcase(f"{row.section}: {row.name}", pattern):
            return f"{label}\nbeside {row.reference_name}"
    return None

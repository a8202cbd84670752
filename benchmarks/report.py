# SPDX-License-Identifier: Apache-2.0
"""Writes ``results.md`` of the results of all machines."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.machine import Machine
from benchmarks.measure import Figure, Row, Timing
from benchmarks.results import Part, Results, rows_of
from benchmarks.targets import bound_of

KERNELS = "kernels"
"""The section that is a table of its own."""

UNITS = {"(bytes)": "bytes", "(encoder runs)": "encoder runs", "(share)": "of it"}
"""Of a row whose name ends so; seconds otherwise."""

FIGURES = {
    Figure.OVER: ("{:.2f} times", "at most {:g} times"),
    Figure.FASTER: ("{:.2f} times faster", "at least {:g} times faster"),
    Figure.SHARE: ("{:.2f} of it", "at least {:g} of it"),
    Figure.VALUE: ("", "at most {:g} s"),
    Figure.COUNT: ("", "exactly {:g}"),
}
"""How a figure is shown, and its target."""

HEAD = """\
# Results

A section for each kind of machine that ran `make bench`, by CPU, cores and tier of kernels; a run
replaces its own. Medians, with the least and the greatest in brackets. Every row was measured in
turn with its reference. Targets are those of the tier (`benchmarks/targets.py`); a row without one
is for comparison.
"""

KERNELS_HEAD = """\
Kernels: the time of this project's, and how many times as long each library takes in its place.
"""


def write_markdown(folder: Path, results: Results) -> None:
    """Write ``results.md``."""
    lines = [HEAD]
    for machine, parts in results.items():
        lines += _section(machine, parts)
    (folder / "results.md").write_text("\n".join(lines))


def _section(machine: Machine, parts: dict[str, Part]) -> Iterator[str]:
    rows = rows_of(parts)
    yield f"## {machine.title}\n"
    yield f"{_conditions(parts)}\n"
    yield "| what | measured | reference | figure | target | met |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in rows:
        if row.section == KERNELS:
            continue
        bound = bound_of(row.section, row.name, machine.tier)
        shown, target = FIGURES[row.figure]
        reference = "" if row.reference is None else _shown(row, row.reference)
        met = "-" if bound is None else {None: "-", True: "yes", False: "**no**"}[row.meets(bound)]
        yield (
            f"| {row.section}: {row.name} | {_shown(row, row.measured)} | "
            f"{f'{row.reference_name} {reference}'.strip() or '-'} | "
            f"{'-' if row.value is None or not shown else shown.format(row.value)} | "
            f"{'-' if bound is None else target.format(bound)} | {met} |"
        )
    yield ""
    yield from _kernel_table([row for row in rows if row.section == KERNELS])


def _kernel_table(rows: list[Row]) -> Iterator[str]:
    """A line for each kernel, a column for each library."""
    libraries = list(dict.fromkeys(row.reference_name for row in rows if row.value is not None))
    if not libraries:
        return
    yield KERNELS_HEAD
    yield f"| kernel | ours | {' | '.join(libraries)} |"
    yield f"| {' | '.join(['---'] * (2 + len(libraries)))} |"
    kernels: dict[str, dict[str, Row]] = {}
    for row in rows:
        kernel, _, _ = row.name.partition(", beside ")
        kernels.setdefault(kernel, {})[row.reference_name] = row
    for kernel, beside in kernels.items():
        ours = _shown(next(iter(beside.values())), next(iter(beside.values())).measured)
        values = [beside[name].value if name in beside else None for name in libraries]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        yield f"| {kernel} | {ours} | {' | '.join(cells)} |"
    yield ""


def _conditions(parts: dict[str, Part]) -> str:
    """What the rows were measured with; ranges where the parts are of several runs."""
    threads = _range([part.threads for part in parts.values()], "{:.0f}")
    products = _range([part.ceilings.gemm_flops / 1e12 for part in parts.values()], "{:.2f}")
    reads = _range([part.ceilings.read_bytes / 1e9 for part in parts.values()], "{:.1f}")
    torch = ", ".join(sorted({part.torch for part in parts.values()}))
    quick = [name for name, part in parts.items() if part.quick]
    return (
        f"{threads} threads, PyTorch {torch}; bf16 products {products} TFLOP/s, reads {reads} GB/s."
        + (f" In the quick form: {', '.join(quick)}." if quick else "")
    )


def _range(numbers: list[float] | list[int], form: str) -> str:
    low, high = form.format(min(numbers)), form.format(max(numbers))
    return low if low == high else f"{low} to {high}"


def _shown(row: Row, timing: Timing) -> str:
    if row.name.endswith("(bytes)"):
        return f"{timing.median / 2**20:.0f} MiB"
    if row.name.endswith("(share)"):
        return f"{timing.median:.2f}"
    if row.name.endswith("(encoder runs)"):
        return f"{timing.median:.0f}"
    low, high = timing.spread
    factor, unit = next(
        (factor, unit)
        for factor, unit, least in ((1, "s", 1.0), (1e3, "ms", 1e-3), (1e6, "µs", 0.0))
        if timing.median >= least
    )
    middle, low, high = (_digits(each * factor) for each in (timing.median, low, high))
    return f"{middle} {unit}" + (f" [{low}, {high}]" if low != high else "")


def _digits(number: float) -> str:
    """Three of them, and no exponent."""
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"

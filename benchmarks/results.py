# SPDX-License-Identifier: Apache-2.0
"""The results of every machine that ran the benchmark, in one file; a run replaces its own."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ceilings import Ceilings
from benchmarks.machine import Machine
from benchmarks.measure import Figure, Row, Timing

FILE = "results.json"


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one part of the benchmark, measured in one run.

    Attributes:
        quick: of the quick form.
        threads: of PyTorch.
        torch: PyTorch's version.
        ceilings: of the machine, in that run.
        rows: in order.
    """

    quick: bool
    threads: int
    torch: str
    ceilings: Ceilings
    rows: tuple[Row, ...]


Results = dict[Machine, dict[str, Part]]
"""By machine, and by the name of the part (``--only``)."""


def read_results(folder: Path) -> Results:
    """What earlier runs wrote to a folder; nothing if there were none."""
    if not (folder / FILE).is_file():
        return {}
    return {
        Machine(entry["cpu"], entry["tier"], entry["cores"]): {
            name: _part(part) for name, part in entry["parts"].items()
        }
        for entry in json.loads((folder / FILE).read_text())["machines"]
    }


def replace_parts(results: Results, machine: Machine, parts: dict[str, Part]) -> Results:
    """The results with these parts of one machine; its other parts and other machines stay."""
    return {**results, machine: {**results.get(machine, {}), **parts}}


def write_results(folder: Path, results: Results) -> None:
    """Write the file, a line for each row."""
    folder.mkdir(parents=True, exist_ok=True)
    machines = ",\n".join(_machine_text(machine, parts) for machine, parts in results.items())
    (folder / FILE).write_text(f'{{"machines": [\n{machines}\n]}}\n')


def rows_of(parts: dict[str, Part]) -> list[Row]:
    """All rows of a machine, in order."""
    return [row for part in parts.values() for row in part.rows]


def _machine_text(machine: Machine, parts: dict[str, Part]) -> str:
    head = json.dumps(dataclasses.asdict(machine))[1:-1]
    body = ",\n".join(f" {json.dumps(name)}: {_part_text(part)}" for name, part in parts.items())
    return f'{{{head}, "parts": {{\n{body}\n}}}}'


def _part_text(part: Part) -> str:
    head = {
        "quick": part.quick,
        "threads": part.threads,
        "torch": part.torch,
        "ceilings": dataclasses.asdict(part.ceilings),
    }
    rows = ",\n".join(f"  {json.dumps(_row_content(row))}" for row in part.rows)
    return f'{{{json.dumps(head)[1:-1]}, "rows": [\n{rows}\n ]}}'


def _row_content(row: Row) -> dict[str, Any]:
    content = dataclasses.asdict(row)
    for name in ("measured", "reference"):
        timing: Timing | None = getattr(row, name)
        content[name] = None if timing is None else [float(f"{x:.5g}") for x in timing.seconds]
    return content


def _part(content: dict[str, Any]) -> Part:
    return Part(
        quick=content["quick"],
        threads=content["threads"],
        torch=content["torch"],
        ceilings=Ceilings(**content["ceilings"]),
        rows=tuple(_rows(content["rows"])),
    )


def _rows(contents: Iterable[dict[str, Any]]) -> Iterable[Row]:
    for content in contents:
        timings = {
            name: None if content[name] is None else Timing(tuple(content[name]))
            for name in ("measured", "reference")
        }
        yield Row(**content | timings | {"figure": Figure(content["figure"])})

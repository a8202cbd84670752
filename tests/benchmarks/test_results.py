# SPDX-License-Identifier: Apache-2.0
"""The results of the benchmark: kept by machine and tier, judged by the targets of that tier."""

from pathlib import Path

import pytest

from benchmarks.ceilings import Ceilings
from benchmarks.machine import Machine, this_machine
from benchmarks.measure import Figure, Row, Timing, compare, interleaved
from benchmarks.pages import PAGE
from benchmarks.report import write_markdown
from benchmarks.results import Part, read_results, replace_parts, rows_of, write_results
from benchmarks.targets import TARGETS, bound_of
from vllm_spyre_mm.config import CPU_TIERS

AMX = Machine("a Xeon", "amx", 4)
NO_AMX = Machine("an EPYC", "avx512_bf16", 2)


def timing(*seconds: float) -> Timing:
    return Timing(seconds)


def part(*rows: Row, quick: bool = False, flops: float = 1e12) -> Part:
    return Part(quick, 2, "2.13.0", Ceilings(flops, 2e10), rows)


def decode_row(seconds: float) -> Row:
    name = "4 sequences of 1000 tokens"
    return compare("decode step", name, timing(seconds), timing(1.0), "the floor")


def test_a_run_replaces_its_own_section_only(tmp_path: Path) -> None:
    start = Row("start", "imports", timing(3.0), figure=Figure.VALUE)
    first = replace_parts({}, AMX, {"decode": part(decode_row(1.2)), "start": part(start)})
    write_results(tmp_path, replace_parts(first, NO_AMX, {"decode": part(decode_row(1.6))}))

    again = replace_parts(read_results(tmp_path), NO_AMX, {"decode": part(decode_row(1.3))})
    write_results(tmp_path, again)

    results = read_results(tmp_path)
    assert list(results) == [AMX, NO_AMX]
    assert rows_of(results[AMX]) == [decode_row(1.2), start]
    assert rows_of(results[NO_AMX]) == [decode_row(1.3)]


def test_tiers_of_one_machine_are_kept_apart(tmp_path: Path) -> None:
    lowered = Machine(NO_AMX.cpu, "avx2", NO_AMX.cores)
    results = replace_parts({}, NO_AMX, {"decode": part(decode_row(1.3))})
    write_results(tmp_path, replace_parts(results, lowered, {"decode": part(decode_row(9.0))}))
    assert len(read_results(tmp_path)) == 2


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    rows = (
        Row("memory", "peak (bytes)", timing(1e9), timing(9e8), "its parts", 1.25),
        Row("4 requests", "beside another", timing(1.0, 2.0), reference_name="absent: make it"),
        Row("evicted", "on (encoder runs)", timing(1.0), figure=Figure.COUNT),
    )
    write_results(tmp_path, {AMX: {"some": part(*rows, quick=True)}})
    assert read_results(tmp_path) == {AMX: {"some": part(*rows, quick=True)}}


def test_a_row_is_judged_by_the_target_of_its_tier(tmp_path: Path) -> None:
    rows = part(decode_row(1.35))
    write_markdown(tmp_path, {AMX: {"decode": rows}, NO_AMX: {"decode": rows}})
    xeon, epyc = (tmp_path / "results.md").read_text().split("## an EPYC, 2 cores")
    assert "| 1.35 times | at most 1.3 times | **no** |" in xeon
    assert "| 1.35 times | at most 1.4 times | yes |" in epyc


def test_parts_of_several_runs_say_so(tmp_path: Path) -> None:
    parts = {"decode": part(decode_row(1.0)), "start": part(decode_row(1.0), flops=2e12)}
    write_markdown(tmp_path, {AMX: parts})
    assert "bf16 products 1.00 to 2.00 TFLOP/s" in (tmp_path / "results.md").read_text()


def test_kernels_are_a_table_of_their_own(tmp_path: Path) -> None:
    rows = [
        compare("kernels", f"rope, beside {name}", timing(1e-3), timing(seconds), name)
        for name, seconds in (("PyTorch", 3e-3), ("Inductor", 5e-4))
    ]
    shown = [Row(**{**_fields(row), "figure": Figure.FASTER}) for row in rows]
    write_markdown(tmp_path, {AMX: {"kernels": part(*shown)}})
    text = (tmp_path / "results.md").read_text()
    assert "| kernel | ours | PyTorch | Inductor |" in text
    assert "| rope | 1 ms | 3.00 | 0.50 |" in text


def _fields(row: Row) -> dict[str, object]:
    return {name: getattr(row, name) for name in Row.__slots__}


@pytest.mark.parametrize(
    ("figure", "ratio", "bound", "met"),
    [
        (Figure.OVER, 1.2, 1.3, True),
        (Figure.OVER, 1.4, 1.3, False),
        (Figure.FASTER, 0.4, 2.0, True),
        (Figure.FASTER, 0.6, 2.0, False),
        (Figure.SHARE, 1.1, 0.9, True),
        (Figure.SHARE, 1.2, 0.9, False),
        (Figure.OVER, None, 1.3, None),
        (Figure.FASTER, None, 1.3, None),
    ],
)
def test_a_figure_keeps_to_its_bound(
    figure: Figure, ratio: float | None, bound: float, met: bool | None
) -> None:
    assert Row("a", "b", timing(1.0), None, "", ratio, figure).meets(bound) is met


def test_a_count_is_met_exactly() -> None:
    row = Row("a", "b (encoder runs)", timing(1.0), figure=Figure.COUNT)
    assert row.meets(1) is True
    assert row.meets(2) is False


def test_targets_name_tiers_that_there_are() -> None:
    named = {tier for target in TARGETS for tier in target.bounds}
    assert named <= {*CPU_TIERS, "any"}


def test_the_target_of_host_work_holds_on_every_tier() -> None:
    assert {bound_of("host work", "a step of 16", tier) for tier in CPU_TIERS} == {1.5}


def test_a_page_of_many_tiles_has_a_target() -> None:
    assert bound_of("vision tower", f"{PAGE}, ours", "avx512_bf16") == 0.8
    assert bound_of("vision tower", f"{PAGE}, eager FMS", "avx512_bf16") is None


def test_every_target_is_of_a_row_that_is_measured() -> None:
    folder = Path(__file__).parents[2] / "benchmarks"
    rows = [row for parts in read_results(folder).values() for row in rows_of(parts)]
    titles = [f"{row.section}: {row.name}" for row in rows]
    unused = [target.rows for target in TARGETS if not any(map(target.fits, titles))]
    assert not unused


def test_the_committed_table_is_of_the_committed_results(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "benchmarks"
    write_markdown(tmp_path, read_results(folder))
    assert (tmp_path / "results.md").read_text() == (folder / "results.md").read_text()


def test_this_machine_has_a_tier() -> None:
    machine = this_machine()
    assert machine.tier in CPU_TIERS
    assert machine.cores >= 1


def test_slow_cases_are_repeated_less_often() -> None:
    calls = []
    timings = interleaved({"slow": lambda: calls.append(1)}, 50, least=3, budget=0.0)
    assert len(timings["slow"].seconds) == 3
    assert len(calls) == 4  # and one before

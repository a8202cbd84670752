# SPDX-License-Identifier: Apache-2.0
"""Timings: taken in turn, so that what else the machine does strikes all alike."""

import enum
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """Repeated measurements of one thing, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Least and greatest."""
        return min(self.seconds), max(self.seconds)


class Figure(enum.StrEnum):
    """The figure of a row, and which way its target bounds it."""

    OVER = "over"
    """Measured over reference; at most."""

    FASTER = "faster"
    """Reference over measured; at least."""

    SHARE = "share"
    """The same as a part of a ceiling; at least."""

    VALUE = "value"
    """What was measured, by itself; at most."""

    COUNT = "count"
    """What was counted; exactly."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the results.

    Attributes:
        section: what is compared.
        name: of the case.
        measured: what this project takes.
        reference: what it is compared with; None where there is none, or none at hand.
        reference_name: of the reference, or why it is not there.
        ratio: measured over reference; None without a reference.
        figure: what of this is shown, and what a target bounds.
    """

    section: str
    name: str
    measured: Timing
    reference: Timing | None = None
    reference_name: str = ""
    ratio: float | None = None
    figure: Figure = Figure.OVER

    @property
    def value(self) -> float | None:
        """The figure itself; None without a reference."""
        if self.figure in (Figure.VALUE, Figure.COUNT):
            return self.measured.median
        if self.ratio is None or self.figure is Figure.OVER:
            return self.ratio
        return 1 / self.ratio

    def meets(self, bound: float) -> bool | None:
        """Whether the figure keeps to a bound; None where there is no figure."""
        value = self.value
        if value is None:
            return None
        if self.figure is Figure.COUNT:
            return value == bound
        return value >= bound if self.figure in (Figure.FASTER, Figure.SHARE) else value <= bound


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmups: int = 1,
    least: int = 3,
    budget: float = 60.0,
) -> dict[str, Timing]:
    """Time each case in turn.

    Args:
        cases: by name.
        repeats: of each, at most.
        warmups: rounds before, which do not count.
        least: repeats of each in any case.
        budget: seconds after which no further round begins.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    began = time.perf_counter()
    for round_number in range(warmups + repeats):
        enough = round_number >= warmups + least
        if enough and time.perf_counter() - began > budget:
            break
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            if round_number >= warmups:
                taken[name].append(time.perf_counter() - started)
    return {name: Timing(tuple(seconds)) for name, seconds in taken.items()}


def compare(
    section: str,
    name: str,
    measured: Timing,
    reference: Timing | None,
    reference_name: str,
    figure: Figure = Figure.OVER,
    *,
    paired: bool = False,
) -> Row:
    """A row with the ratio of measured over reference, of medians.

    Args:
        section: of the row.
        name: of the row.
        measured: this project's.
        reference: the other's.
        reference_name: what the other is.
        figure: what is shown.
        paired: each measurement was taken beside one of the reference: the ratio is the median of
            their ratios, which the machine's drift leaves alone.
    """
    ratio = None
    if reference is not None and paired:
        pairs = zip(measured.seconds, reference.seconds, strict=True)
        ratio = statistics.median(one / other for one, other in pairs)
    elif reference is not None:
        ratio = measured.median / reference.median
    return Row(section, name, measured, reference, reference_name, ratio, figure)


def constant(seconds: float | Sequence[float]) -> Timing:
    """A computed bound, or measurements that were taken elsewhere."""
    return Timing(tuple(seconds) if isinstance(seconds, Sequence) else (seconds,))

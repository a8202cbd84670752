# SPDX-License-Identifier: Apache-2.0
"""Timings: taken in turn, so that what else the machine does strikes all alike."""

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


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the results.

    Attributes:
        section: what is compared.
        name: of the case.
        measured: what this project takes.
        reference: what it is compared with; None where there is none at hand.
        reference_name: of the reference.
        ratio: the figure that the target speaks of.
        target: the target, in words.
        met: whether the ratio meets it; None without a reference.
    """

    section: str
    name: str
    measured: Timing
    reference: Timing | None
    reference_name: str
    ratio: float | None
    target: str
    met: bool | None


def interleaved(
    cases: Mapping[str, Callable[[], object]], repeats: int, *, warmups: int = 1
) -> dict[str, Timing]:
    """Time each case ``repeats`` times, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for round_number in range(warmups + repeats):
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
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    paired: bool = False,
) -> Row:
    """A row whose ratio is measured over reference, of medians.

    Args:
        section: of the row.
        name: of the row.
        measured: this project's.
        reference: the other's.
        reference_name: what the other is.
        at_most: the ratio's bound from above.
        at_least: a speed-up instead: reference over measured is bounded from below.
        paired: each measurement was taken beside one of the reference: the ratio is the median of
            their ratios, which the machine's drift leaves alone.
    """
    ratio = met = None
    target = f"at most {at_most:g} times" if at_most is not None else f"{at_least:g} times faster"
    if reference is not None:
        if paired:
            pairs = zip(measured.seconds, reference.seconds, strict=True)
            ratio = statistics.median(one / other for one, other in pairs)
        else:
            ratio = measured.median / reference.median
        if at_least is not None:
            ratio = 1 / ratio
            met = ratio >= at_least
        elif at_most is not None:
            met = ratio <= at_most
    return Row(section, name, measured, reference, reference_name, ratio, target, met)


def constant(seconds: float | Sequence[float]) -> Timing:
    """A computed bound, or measurements that were taken elsewhere."""
    return Timing(tuple(seconds) if isinstance(seconds, Sequence) else (seconds,))

# SPDX-License-Identifier: Apache-2.0
"""What a soak found, in words."""

from tools.soak.soak import SoakResult

MAX_GROWTH = 0.01
"""Of resident memory over the second half."""

ENOUGH_TO_MEASURE = 2000
"""Requests from which on the growth says something: caches fill and allocators settle first."""


def faults(result: SoakResult) -> list[str]:
    """What should not be, a line each; none for a soak that passed."""
    found = [*result.wrong, *result.grown]
    if result.late > 1:  # 1 is the step under way
        found.append(f"a request took part in the {result.late}th step after its abort")
    if result.endings.total() >= ENOUGH_TO_MEASURE:
        found += [
            f"resident memory of the {name} grew by {growth:.1%} over the second half"
            for name, growth in result.growth().items()
            if growth > MAX_GROWTH
        ]
    return found


def report(result: SoakResult) -> str:
    """The figures, then the faults."""
    total = result.endings.total()
    lines = [
        f"{total} requests in {result.seconds:.0f} s: "
        + ", ".join(f"{count} {ending}" for ending, count in sorted(result.endings.items()))
        + f"; {result.preemptions} preemptions, {result.evicted} images evicted",
    ]
    for name, growth in result.growth().items():
        last = result.resident[-1][1][name] / (1 << 20)
        lines.append(
            f"resident memory of {name}: {last:.0f} MiB, {growth:+.2%} over the second half"
        )
    found = faults(result)
    lines += [f"{len(found)} faults", *found[:50]] if found else ["nothing is left of them"]
    return "\n".join(lines)

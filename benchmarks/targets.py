# SPDX-License-Identifier: Apache-2.0
"""The targets: which figure of which row has which bound, on which tier of kernels."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

ANY = "any"
"""In place of a tier: the bound holds on those that have none of their own."""


@dataclass(frozen=True, slots=True)
class Target:
    """A bound for some rows.

    Attributes:
        rows: pattern of "section: name".
        bounds: of the row's figure (:class:`benchmarks.measure.Figure`), by tier; a tier that is
            not named has no target.
    """

    rows: str
    bounds: Mapping[str, float]

    def fits(self, title: str) -> bool:
        """Whether it is of this "section: name"."""
        return fnmatch.fnmatchcase(title, self.rows)


TARGETS = (
    Target("attention: *", {"amx": 1.25, "avx512_bf16": 1.25}),
    Target("vision tower: 1 tile, ours", {}),
    Target("vision tower: * tiles, ours", {"amx": 0.9, "avx512_bf16": 0.85}),
    Target("vision tower: *, two ranks", {ANY: 1.1}),
    Target("vision tower: a page of *, ours", {"amx": 0.8, "avx512_bf16": 0.8}),
    Target("vision tower of Qwen-VL: *", {"amx": 0.8, "avx512_bf16": 0.8}),
    Target("decode step: *", {"amx": 1.3, "avx512_bf16": 1.4}),
    Target("host work: a step of *", {ANY: 1.5}),
    Target("4 requests, a picture each: beside vLLM's CPU backend", {"amx": 2, "avx512_bf16": 2}),
    Target("4 requests, a picture each: beside Transformers*", {ANY: 1.3}),
    Target("4 requests, a picture each: embeddings returned", {ANY: 1.02}),
    Target("the same picture again: *", {ANY: 5}),
    Target("features evicted, the same picture again: embeddings on*", {ANY: 1}),
    Target("features evicted, the same picture again: embeddings off*", {ANY: 0}),
    Target("start: *, cold compile cache", {"amx": 5, ANY: 8}),
    Target("start: *, warm compile cache", {"amx": 1.8, ANY: 2.5}),
    Target("memory: peak above imports*", {"amx": 1.15, ANY: 1.2}),
    Target("memory: embed after *", {ANY: 1.01}),
    Target("bulk: embed*", {ANY: 0.95}),
    Target("pictures of several requests: *", {ANY: 1.3}),
    Target("pictures beside a text: *: its longest pause", {ANY: 1.0}),
    Target("pictures beside a stand-in card: *, median time between two*", {ANY: 1.1}),
)
"""The first whose pattern fits is taken."""


def bound_of(section: str, name: str, tier: str) -> float | None:
    """The bound of a row's figure on a tier, None where there is no target."""
    for target in TARGETS:
        if target.fits(f"{section}: {name}"):
            return target.bounds.get(tier, target.bounds.get(ANY))
    return None

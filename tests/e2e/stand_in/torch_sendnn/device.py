# SPDX-License-Identifier: Apache-2.0
"""The device's memory: the KV cache is there, and what the host holds are ghosts of it, all NaN.

Whoever reads a ghost on the host gets NaN. Whoever hands over anything but the latest ghosts, or
new zeros in their place, is found out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class Device:
    """Keeps what ghosts stand for, by where a ghost lies; the ghosts are kept, so that no other
    tensor ever lies there."""

    def __init__(self) -> None:
        self._real: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._shapes: set[tuple[int, ...]] = set()
        self._taken: dict[int, torch.Tensor] = {}

    def load(self, named: Mapping[str, Any], in_warmup: bool) -> tuple[list[Any], list[str]]:
        """The inputs of a graph with the device's caches in place of their ghosts, and the faults.

        Args:
            named: inputs of the graph by placeholder name.
            in_warmup: whether a cache of another shape may be moved to the device.
        """
        loaded, faults = [], []
        for name, each in named.items():
            if "past_key_value" not in name:
                loaded.append(each)
            elif each.data_ptr() in self._real:
                ghost, real = self._real[each.data_ptr()]
                if not ghost.isnan().all():
                    faults.append("the KV cache was written to on the host")
                loaded.append(real)
            else:
                faults += self._faults_of_new(each, in_warmup)
                self._taken[each.data_ptr()] = each
                self._shapes.add(tuple(each.shape))
                loaded.append(each)
        return loaded, faults

    def _faults_of_new(self, cache: torch.Tensor, in_warmup: bool) -> list[str]:
        """Faults of a cache of the host's.

        S hands over new zeros after the warmup (``v1/worker/spyre_model_runner.py:888``). A list
        that is not replaced by what a step returns costs the host the memory of a cache (PR#1004).
        """
        if cache.data_ptr() in self._taken:
            return ["a KV cache was handed over again that a step had returned another for"]
        if not in_warmup and tuple(cache.shape) not in self._shapes:
            return [f"a KV cache of a new shape was handed over: {tuple(cache.shape)}"]
        if cache.any():
            return ["a KV cache was handed over that is neither the device's last nor new zeros"]
        return []

    def store(self, outputs: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs of a graph with ghosts in place of the caches."""
        self._real = {}
        return tuple(map(self._ghost, outputs))

    def _ghost(self, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or tuple(output.shape) not in self._shapes:
            return output
        ghost = torch.full_like(output, torch.nan)
        self._real[ghost.data_ptr()] = (ghost, output)
        return ghost

    def made_up(self, named: Mapping[str, Any], computed: Sequence[Any]) -> tuple[Any, ...]:
        """Outputs of a graph that nobody computed: its caches as they came, and zeros.

        Args:
            named: inputs of the graph by placeholder name.
            computed: outputs of another run, whose first dimension is the rows of its batch.
        """
        caches = iter([each for name, each in named.items() if "past_key_value" in name])
        rows = next(len(each) for name, each in named.items() if "embeds" in name)
        return tuple(
            next(caches)
            if tuple(each.shape) in self._shapes
            else each.new_zeros((rows, *each.shape[1:]))
            for each in computed
        )

    def poison(self) -> None:
        """Fill the device's KV cache with NaN."""
        for _, real in self._real.values():
            real.fill_(torch.nan)

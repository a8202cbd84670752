# SPDX-License-Identifier: Apache-2.0
"""The contract of a run: what its inputs have to be, whatever is computed with them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

BLOCK = 64


@dataclass(frozen=True)
class Limits:
    """What the card's compiler was told, in tokens and rows; see ``docs/running-on-a-card.md``."""

    chunk: int
    context: int
    batch: int
    batch_tkv: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Limits":
        names = ("CHUNK_LEN", "MAX_CONTEXT_LEN", "MAX_BATCH_SIZE", "MAX_BATCH_TKV_LIMIT")
        return cls(*(int(environment[f"VLLM_DT_{name}"]) for name in names))


def faults_of_run(
    symbolic: Mapping[str, Any], named: Mapping[str, Any], limits: Limits
) -> list[str]:
    """Everything that the contract forbids, as sentences.

    Args:
        symbolic: the graph's inputs as they were compiled.
        named: the inputs of the run.
        limits: of the compiler.
    """
    faults = list(_faults_of_shapes(symbolic, named))
    step = {name: _only(named, name) for name in NAMES}
    faults += _faults_of_limits(step, limits)
    faults += _faults_of_slots(step)
    return faults


NAMES = ("slot_mapping", "block_table", "current_tkv_mask", "left_padded_prompt_mask")


def _only(named: Mapping[str, Any], part: str) -> torch.Tensor:
    (tensor,) = (value for name, value in named.items() if part in name)
    return tensor


def _faults_of_shapes(symbolic: Mapping[str, Any], named: Mapping[str, Any]) -> Iterator[str]:
    """Shapes, dtypes and layouts that the graph of the warmup does not stand for.

    A dimension that the warmup had marked is a symbol; one symbol has one value in a run.
    """
    values: dict[str, int] = {}
    for name, compiled in symbolic.items():
        given = named[name]
        if not isinstance(compiled, torch.Tensor):
            continue
        if (given.dtype, given.ndim) != (compiled.dtype, compiled.ndim):
            yield f"{name} is {given.dtype} of {given.ndim} dimensions"
            continue
        for size, expected in zip(given.shape, compiled.shape, strict=True):
            known = values.setdefault(str(expected), size) if _is_symbol(expected) else expected
            if size != known:
                yield f"{name} has shape {tuple(given.shape)}, compiled was {tuple(compiled.shape)}"


def _is_symbol(size: int | torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt)


def _faults_of_limits(step: Mapping[str, torch.Tensor], limits: Limits) -> Iterator[str]:
    rows, width = step["block_table"].shape
    length = width * BLOCK
    if rows * length > limits.batch_tkv:
        yield f"{rows} rows of {length} tokens exceed the bound of {limits.batch_tkv}"
    if rows > limits.batch:
        yield f"{rows} rows exceed the batch of {limits.batch}"
    if length > limits.context:
        yield f"{length} tokens exceed the context of {limits.context}"
    queries = step["slot_mapping"].shape[1]
    if queries not in (1, limits.chunk):
        yield f"a step of {queries} tokens is neither a chunk of {limits.chunk} nor a decode"
    if queries == 1 and (rows < 2 or width < 2):
        yield f"a decode of {rows} rows and {width} blocks: two are the least"


@dataclass(frozen=True)
class Row:
    """One sequence of a step. Padded positions count from the left of its block table.

    Attributes:
        slots: cache rows of its tokens of this step, the last at position ``end - 1``.
        table: its blocks.
        end: of what is in the cache after the step, padding after a prompt included.
        left: positions that are padding before it.
    """

    slots: list[int]
    table: list[int]
    end: int
    left: int

    @property
    def is_spare(self) -> bool:
        """Whether it decodes nothing: a row that fills a batch."""
        return len(self.slots) == 1 and not any(self.table) and self.end == self.left + 1

    def faults(self) -> Iterator[str]:
        """Where its tokens are written, and what its blocks are."""
        table, left, end = self.table, self.left, self.end
        if left % BLOCK or not 0 <= left < end <= len(table) * BLOCK:
            yield f"a row from {left} to {end} does not fit its {len(table)} blocks"
            return
        for position, slot in enumerate(self.slots, start=end - len(self.slots)):
            is_real = position >= left and not self.is_spare
            if slot != table[position // BLOCK] * BLOCK + position % BLOCK:
                yield f"slot {slot} is not position {position} of the block table {table}"
            if is_real and slot < BLOCK:
                yield f"a real token at position {position} is written to block 0"
            if not is_real and slot >= BLOCK:
                yield f"padding at position {position} is written to block {slot // BLOCK}"
        if any(table[: left // BLOCK]):
            yield f"the padding before a row is not block 0: {table}"
        if not self.is_spare and not all(table[left // BLOCK : -(-end // BLOCK)]):
            yield f"a block of a row is block 0: {table}"


def _faults_of_slots(step: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Real tokens are written to their own blocks, each to one; padding before them to block 0."""
    rows = [Row(*each) for each in zip(*(step[name].tolist() for name in NAMES), strict=True)]
    for row in rows:
        yield from row.faults()
    owned = [slot for row in rows for slot in row.slots if slot >= BLOCK]
    if len(owned) != len(set(owned)):
        yield "two tokens are written to one slot"
    spare = sum(row.is_spare for row in rows)
    if spare and len(rows) > 2:
        yield f"{spare} of {len(rows)} rows are spare: two rows are enough"

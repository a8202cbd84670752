# SPDX-License-Identifier: Apache-2.0
"""The contract of a run: what its inputs have to be, whatever is computed with them.

Where rules are from: see the package.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torch_sendnn.graphs import HEAD, inputs_of

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
    inputs = inputs_of(named)
    step = {name: tensors[0] for name, tensors in inputs.items()}
    faults = [*_faults_of_tensors(named), *_faults_of_shapes(symbolic, named)]
    faults += [*_faults_of_limits(step, limits), *_faults_of_blocks(step, limits)]
    faults += _faults_of_rows(step)
    return faults


def _faults_of_tensors(named: Mapping[str, Any]) -> Iterator[str]:
    for name, each in named.items():
        if not isinstance(each, torch.Tensor):
            continue
        # A node without a dtype fails in the backend: S platform.py:474, issue#20.
        if each.is_inference():
            yield f"{name} was made in inference mode"
        # A clones its inputs: a tensor that lies otherwise gave a new graph.
        if not name.startswith("l_self_") and not (
            each.is_contiguous() and each.storage_offset() == 0
        ):
            yield f"{name} is not contiguous at offset 0 of its storage"


def _faults_of_shapes(symbolic: Mapping[str, Any], named: Mapping[str, Any]) -> Iterator[str]:
    """Shapes and dtypes that the graph of the warmup does not stand for: what is no symbol is a
    constant, and one symbol has one value in a run.

    Whether a program can be had for a size is asked of the symbols alone, so that a KV cache of
    another shape is compiled anew (S ``v1/worker/spyre_model_runner.py:865``, PR#384).
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
    rows, queries = step["slot_mapping"].shape
    length = int(step["current_tkv_mask"].max())
    # The length is not rounded up to blocks: S v1/core/scheduler.py.
    if rows * length > limits.batch_tkv:
        yield f"{rows} rows of {length} tokens exceed the bound of {limits.batch_tkv}"
    # S platform.py:431-440.
    if rows > limits.batch:
        yield f"{rows} rows exceed the batch of {limits.batch}"
    if length > limits.context:
        yield f"{length} tokens exceed the context of {limits.context}"
    # Always a whole chunk, although its length is a symbol: S v1/worker/spyre_model_runner.py:1101.
    if queries not in (1, limits.chunk):
        yield f"a step of {queries} tokens is neither a chunk of {limits.chunk} nor a decode"


def _faults_of_blocks(step: Mapping[str, torch.Tensor], limits: Limits) -> Iterator[str]:
    """The KV cache's blocks are a multiple of the batch: S ``platform.py:156-218``. At a batch of 3
    a card failed with 16 of them, and ran with 15 and with 18."""
    blocks = len(step["past_key_value"])
    if blocks % limits.batch:
        yield f"a KV cache of {blocks} blocks is no multiple of the batch of {limits.batch}"


@dataclass(frozen=True)
class Row:
    """One sequence of a step. Padded positions count from the left of its block table.

    S ``v1/worker/spyre_model_runner.py:1101-1478``, A ``utils/paged.py:318-520``, F
    ``utils/spyre/paged.py``.

    Attributes:
        slots: cache rows of its tokens of this step, the last at position ``end - 1``.
        table: its blocks.
        end: of what is in the cache after the step, padding after a prompt included.
        left: positions that are padding before it.
        position_ids: of its tokens of this step; None if they are not looked at.
    """

    slots: list[int]
    table: list[int]
    end: int
    left: int
    position_ids: list[int] | None = None

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
        yield from self._faults_of_positions()

    def _faults_of_positions(self) -> Iterator[str]:
        """Positions count real tokens; 0 on padding, which after a prompt is in its last block."""
        if self.position_ids is None:
            return
        start = self.end - len(self.slots)
        for position, given in enumerate(self.position_ids, start=start):
            may_be_padding = position > self.end - BLOCK and len(self.slots) > 1
            if given != max(0, position - self.left) and not (may_be_padding and given == 0):
                yield f"position {position} of a row after {self.left} is called {given}"


def _faults_of_rotations(
    rotations: torch.Tensor, step: Mapping[str, torch.Tensor]
) -> Iterator[str]:
    """In place of positions: rows of RoPE's table (F ``modules/positions.py``), those of position 0
    on the padding before a prompt."""
    rows, queries = step["slot_mapping"].shape
    identity = torch.eye(2)
    if rotations.shape[:2] != (rows, queries) or rotations.shape[2:] != (HEAD // 2, 2, 2):
        yield f"the rotations of {rows} rows of {queries} tokens are {tuple(rotations.shape)}"
    elif not torch.allclose(rotations @ rotations.mT, identity.expand_as(rotations), atol=1e-4):
        yield "a rotation stretches"
    elif queries > 1:
        starts = step["current_tkv_mask"] - queries
        before = (step["left_padded_prompt_mask"] - starts).clamp(0, queries).tolist()
        if any((row[:end] != identity).any() for row, end in zip(rotations, before, strict=True)):
            yield "the padding before a row is rotated"


def _faults_of_rows(step: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Real tokens are written to their own blocks, each to one; padding before them to block 0."""
    names = ("slot_mapping", "block_table", "current_tkv_mask", "left_padded_prompt_mask")
    columns = [step[name].tolist() for name in names]
    positions = step.get("position_ids")
    if positions is not None and positions.is_floating_point():
        yield from _faults_of_rotations(positions, step)
    elif positions is not None:
        columns.append(positions.tolist())
    rows = [Row(*each) for each in zip(*columns, strict=True)]
    for row in rows:
        yield from row.faults()
    owned = [slot for row in rows for slot in row.slots if slot >= BLOCK]
    if len(owned) != len(set(owned)):
        yield "two tokens are written to one slot"

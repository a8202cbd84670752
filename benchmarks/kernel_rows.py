# SPDX-License-Identifier: Apache-2.0
"""Each kernel beside what libraries give in its place: why each file of C++ exists.

The shapes are those of Granite Vision 3.x 2B: its tower, its decoder's fused feed-forward layer and
its heads. Weights of a decode are more than a cache holds.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import library_kernels as library
from benchmarks import own_kernels as own
from benchmarks.measure import Figure, Row, Timing, compare, interleaved
from benchmarks.process import Driver
from benchmarks.report import KERNELS

VLLM = "vLLM's operator"
ROUNDS = 3
"""Turns of the kernels here and of vLLM's, which are in another process."""

REST_SECONDS = 0.25
"""Between the two: threads that have worked spin for a while before they sleep."""

BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM = 64, 32, 8, 64
TOWER, WIDTH, OUTPUTS, VOCABULARY = (1152, 4304, 16, 72), 2048, 16_384, 49_152
TILES, PATCHES, CHUNK, CONTEXT = 2, 729, 512, 2048


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel in one place.

    Attributes:
        name: of the row.
        ours: the project's.
        others: the libraries', by name; each gives what ``ours`` does.
        operator: of vLLM's CPU backend, and its shape; None where it has none of its own.
        checked: whether the results are compared.
    """

    name: str
    ours: own.Kernel
    others: dict[str, own.Kernel]
    operator: tuple[str, dict[str, Any]] | None = None
    checked: bool = field(default=True)


@torch.no_grad()  # without it Inductor freezes nothing
def kernel_rows(vllm_cpu: str | None, quick: bool) -> Iterator[Row]:
    """Linear layers, attention, argmax and rope, each where it is used."""
    with contextlib.ExitStack() as stack:
        vllm = None
        if vllm_cpu is not None:
            vllm = stack.enter_context(Driver(Path(), kind="vllm operators", python=vllm_cpu))
        for case in _cases():
            yield from _rows(case, vllm, 2 if quick else 7)


def _rows(case: Case, vllm: Driver | None, repeats: int) -> Iterator[Row]:
    expected = case.ours()
    if case.checked:
        for name, other in case.others.items():
            _check(f"{case.name}, {name}", other(), expected)
    kernels = {"ours": case.ours, **case.others}
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(ROUNDS):
        timings = interleaved(kernels, repeats, budget=20 / ROUNDS)
        for name, timing in timings.items():
            seconds[name] += timing.seconds
        if vllm is not None and case.operator is not None:
            operator, shape = case.operator
            time.sleep(REST_SECONDS)
            answer = vllm.ask(
                "measure", name=case.name, operator=operator, shape=shape, repeats=repeats
            )
            seconds.setdefault(VLLM, []).extend(answer["seconds"])
            time.sleep(REST_SECONDS)
    if VLLM in seconds and vllm is not None:
        vllm.ask("forget", name=case.name)
    ours = Timing(tuple(seconds.pop("ours")))
    for name, taken in seconds.items():
        other = Timing(tuple(taken))
        yield compare(KERNELS, f"{case.name}, beside {name}", ours, other, name, Figure.FASTER)
    if vllm is None and case.operator is not None:
        absent = "absent: make bench-reference"
        yield Row(KERNELS, f"{case.name}, beside {VLLM}", ours, reference_name=absent)


def _check(name: str, result: torch.Tensor, expected: torch.Tensor) -> None:
    """Both compute the same, to the rounding of bf16."""
    difference = (result.float() - expected.float().view(result.shape)).norm()
    share = float(difference / expected.float().norm())
    if not share < 0.02:
        raise RuntimeError(f"{name}: differs from this project's kernel by {share:.3g} of its norm")


def _cases() -> Iterator[Case]:
    """One at a time: the weights of one are gone before those of the next are made."""
    yield _linear("tower", TILES * PATCHES, TOWER[0], TOWER[1], layers=1, gelu=True)
    yield _linear(f"chunk of {CHUNK}", CHUNK, WIDTH, OUTPUTS, layers=1)
    for rows in (1, 4, 16):
        yield _linear(f"decode of {rows}", rows, WIDTH, OUTPUTS, layers=2)
    yield _tower_attention()
    yield _paged_attention(f"chunk of {CHUNK}, {CONTEXT} keys", 1, CHUNK, CONTEXT)
    yield _paged_attention("decode of 16, 1000 keys", 16, 1, 1000)
    yield _argmax()
    for name, tokens in ((f"chunk of {CHUNK}", CHUNK), ("decode of 16", 16)):
        yield _rope(name, tokens)


def _linear(
    name: str, rows: int, width: int, outputs: int, layers: int, gelu: bool = False
) -> Case:
    x, linears = library.make_linears(rows, width, outputs, layers)
    shape = {"rows": rows, "width": width, "outputs": outputs, "layers": layers, "gelu": gelu}
    return Case(
        f"linear, {name}",
        own.linear(x, linears, gelu),
        library.linears(x, linears, gelu),
        ("linear", shape),
    )


def _tower_attention() -> Case:
    """vLLM's towers take PyTorch's attention."""
    _, _, heads, head_dim = TOWER
    parts = [torch.randn(TILES, PATCHES, heads, head_dim).bfloat16() for _ in range(3)]
    others = library.attention(*parts, causal=False)
    return Case("attention, tower", own.attention_to_all(*parts), others)


def _paged_attention(name: str, batch: int, queries: int, keys: int) -> Case:
    """The libraries' take keys and values that lie side by side, which a paged cache's do not."""
    width = -(-keys // BLOCK_SIZE)
    shape = (batch * width + 1, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    caches = [torch.randn(shape).bfloat16() for _ in range(2)]
    table = (torch.randperm(batch * width) + 1).view(batch, width)
    query = torch.randn(batch, queries, HEADS, HEAD_DIM).bfloat16()
    side_by_side = [cache[table].flatten(1, 2)[:, :keys] for cache in caches]
    heads = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return Case(
        f"attention, {name}",
        own.paged_attention(query, *caches, table, keys),
        library.attention(query, *side_by_side, causal=queries > 1),
        ("attention", {"batch": batch, "queries": queries, "keys": keys, **heads}),
    )


def _argmax() -> Case:
    logits = torch.randn(16, VOCABULARY)
    shape = {"rows": 16, "width": VOCABULARY}
    return Case("argmax, 16 rows", own.argmax(logits), library.argmax(logits), ("argmax", shape))


def _rope(name: str, tokens: int) -> Case:
    """vLLM rotates halves of a head, FMS pairs: as many numbers, in another order."""
    query = torch.randn(1, tokens, HEADS, HEAD_DIM).bfloat16()
    keys = torch.randn(1, tokens, KV_HEADS, HEAD_DIM).bfloat16()
    angles = torch.outer(torch.arange(8192.0), 10_000 ** -torch.linspace(0, 1, HEAD_DIM // 2))
    table = torch.stack([angles.cos(), angles.sin()], -1)
    heads = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return Case(
        f"rope, {name}",
        own.rope(query, keys, table),
        library.rope(query, keys, table),
        ("rope", {"tokens": tokens, **heads}),
    )

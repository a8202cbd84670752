# SPDX-License-Identifier: Apache-2.0
"""The contract of a graph: what the compiler is given, before anything runs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

BLOCK = 64
HEAD = 128

DYNAMIC: dict[str, dict[str, tuple[int, ...]]] = {
    "chunk": {
        "embeds": (1,),
        "deepstack": (1,),
        "position_ids": (1,),
        "slot_mapping": (1,),
        "block_table": (1,),
        "current_tkv_mask": (),
        "left_padded_prompt_mask": (),
        "past_key_value": (),
    },
    "decode": {
        "embeds": (0,),
        "position_ids": (0,),
        "slot_mapping": (0,),
        "block_table": (0, 1),
        "current_tkv_mask": (0,),
        "left_padded_prompt_mask": (0,),
        "past_key_value": (),
    },
}
"""Dimensions of each input that are symbols of the graph; all others are constants.

S ``v1/worker/spyre_model_runner.py:1101-1478``, A ``utils/paged.py``: the same marks in both.
Nothing public has levels of deepstack: they are held to be marked as the embeddings are.
"""


def inputs_of(named: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The inputs of a step by what they are; what is left out belongs to the model."""
    found: dict[str, list[Any]] = {}
    for name, each in named.items():
        if name.startswith("l_self_") or not isinstance(each, torch.Tensor):
            continue
        (kind,) = (part for part in DYNAMIC["chunk"] if part in name)
        found.setdefault(kind, []).append(each)
    return found


def is_decode(named: Mapping[str, Any]) -> bool:
    """Whether a graph, or a run, has one token of each row."""
    (slots,) = inputs_of(named)["slot_mapping"]
    return isinstance(slots.shape[1], int) and slots.shape[1] == 1


def faults_of_graph(symbolic: Mapping[str, Any], options: Mapping[str, Any] | None) -> list[str]:
    """Everything that the contract forbids of a graph, as sentences.

    Args:
        symbolic: its inputs by placeholder name, with symbolic shapes.
        options: of the call of ``torch.compile``.
    """
    faults = [*_faults_of_marks(symbolic), *_faults_of_dtypes(symbolic)]
    # Without it the compiler has no symbols: S model_executor/model_loader/spyre.py:376, PR#149.
    if options != {"sendnn.dynamic": True}:
        faults.append(f"the options are {options}, not {{'sendnn.dynamic': True}}")
    return faults


def _faults_of_marks(symbolic: Mapping[str, Any]) -> Iterator[str]:
    kind = "decode" if is_decode(symbolic) else "chunk"
    inputs = inputs_of(symbolic)
    if kind == "decode" and "deepstack" in inputs:
        yield "a decode has levels of deepstack: it has no features"
    for name, expected in DYNAMIC[kind].items():
        for tensor in inputs.get(name, []):
            found = tuple(i for i, size in enumerate(tensor.shape) if not isinstance(size, int))
            if found != expected:
                yield f"{name} of a {kind} varies in dimensions {found}, not {expected}"
    for name in set(DYNAMIC[kind]) - set(inputs) - {"deepstack"}:  # few models have levels
        yield f"a {kind} has no {name}"
    # A constant: S v1/worker/spyre_model_runner.py:2016, PR#464.
    if any("last_n_tokens" in name for name in symbolic):
        yield "last_n_tokens is an input of the graph"


def _faults_of_dtypes(symbolic: Mapping[str, Any]) -> Iterator[str]:
    """fp16 throughout (S ``model_loader/spyre.py:109``), integers of 64 bits; RoPE's table of 2 × 2
    matrices is an fp32 constant (F)."""
    for name, each in symbolic.items():
        if not isinstance(each, torch.Tensor):
            continue
        is_rope = each.dtype == torch.float32 and tuple(each.shape[-2:]) == (2, 2)
        if each.dtype not in (torch.float16, torch.int64, torch.bool) and not is_rope:
            yield f"{name} of shape {tuple(each.shape)} is {each.dtype}"
        # F utils: narrower heads are padded to this, and blocks have 64 tokens.
        if "past_key_value" in name and (each.shape[1], each.shape[3]) != (BLOCK, HEAD):
            yield f"{name} has shape {tuple(each.shape)}, not (blocks, {BLOCK}, heads, {HEAD})"


def faults_of_outputs(symbolic: Mapping[str, Any], outputs: Sequence[Any]) -> list[str]:
    """Faults of what a run gives: logits in fp32, of 64 positions or of one.

    fp16 logits are rounded to the device's own 16 bits: the cast to fp32 has to be a part of the
    graph (S ``model_loader/spyre.py:109-132``).
    """
    caches = {tuple(each.shape) for each in inputs_of(symbolic)["past_key_value"]}
    positions = 1 if is_decode(symbolic) else BLOCK
    faults = []
    for each in outputs:
        if not isinstance(each, torch.Tensor) or tuple(each.shape) in caches:
            continue
        if each.dtype != torch.float32:
            faults.append(f"the graph gives logits in {each.dtype}, not torch.float32")
        if each.ndim != 3 or each.shape[1] != positions:
            faults.append(f"the graph gives logits of shape {tuple(each.shape)}")
    return faults

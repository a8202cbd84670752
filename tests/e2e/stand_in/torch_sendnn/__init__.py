# SPDX-License-Identifier: Apache-2.0
"""Stands in for the card's compiler: runs each graph as it is, and holds callers to the contract.

Importable as ``torch_sendnn`` where a test puts its folder on the path. Like the original it reads
``VLLM_DT_*`` when it is imported, and registers the ``torch.compile`` backend ``sendnn``. Every run
is checked (:mod:`.conformance`), and the KV cache lives on a device of its own (:mod:`.device`).
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo import register_backend

from torch_sendnn.conformance import Limits, faults_of_run
from torch_sendnn.device import Device

Named = dict[str, Any]
"""Inputs of a graph by placeholder name: tensors, and the integers of dynamic dimensions."""


@dataclass
class Record:
    """What happened, for the test to look at.

    Attributes:
        environment: ``VLLM_DT_*`` at import.
        graphs: the inputs of each compiled graph, by placeholder name, with symbolic shapes.
        warmups: how often warmup mode was entered.
        in_warmup: whether it is active.
        compiled_outside: graphs compiled outside warmup mode.
        runs: for each run the graph's number, whether warmup mode was active, and the shapes of the
            inputs by placeholder name.
        faults: everything that the contract forbids, as sentences.
        fail_compiling: of a graph's inputs: what the compiler says of them instead of a program.
        fail_running: of a run's inputs: what the device says of them instead of a result.
    """

    environment: dict[str, str]
    graphs: list[Named] = field(default_factory=list)
    warmups: int = 0
    in_warmup: bool = False
    compiled_outside: int = 0
    runs: list[tuple[int, bool, dict[str, tuple[int, ...]]]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    fail_compiling: Callable[[Named], str | None] | None = None
    fail_running: Callable[[Named], str | None] | None = None


record = Record({name: value for name, value in os.environ.items() if name.startswith("VLLM_DT_")})
device = Device()


class DtException(RuntimeError):
    """What the card's software raises."""


@register_backend(name="sendnn")
def compile_graph(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """The backend: keeps the graph's inputs and runs it with PyTorch."""
    number = len(record.graphs)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    symbolic = {node.name: node.meta.get("example_value") for node in placeholders}
    _raise_if(record.fail_compiling, symbolic)
    record.graphs.append(symbolic)
    record.compiled_outside += not record.in_warmup
    limits = Limits.from_environment(record.environment)

    def run(*inputs: Any) -> Any:
        named = dict(zip(symbolic, inputs, strict=True))
        tensors = {name: each for name, each in named.items() if isinstance(each, torch.Tensor)}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        record.runs.append((number, record.in_warmup, shapes))
        record.faults += faults_of_run(symbolic, named, limits)
        _raise_if(record.fail_running, named)
        loaded, faults = device.load(named, record.in_warmup)
        record.faults += faults
        return device.store(graph(*loaded))

    return run


def _raise_if(fails: Callable[[Named], str | None] | None, named: Named) -> None:
    said = fails(named) if fails is not None else None
    if said:
        raise DtException(said)


@contextlib.contextmanager
def warmup_mode() -> Iterator[None]:
    """Graphs are made inside."""
    record.warmups += 1
    record.in_warmup = True
    try:
        yield
    finally:
        record.in_warmup = False

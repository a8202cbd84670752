# SPDX-License-Identifier: Apache-2.0
"""Stands in for the card's compiler: runs each graph as it is, and holds callers to the contract.

Importable as ``torch_sendnn`` where a test puts its folder on the path. Like the original it reads
its environment when it is imported, and registers the ``torch.compile`` backend ``sendnn``. Graphs
are checked when they are made (:mod:`.graphs`), with the environment (:mod:`.variables`), and every
run is (:mod:`.conformance`); the KV cache lives on a device of its own (:mod:`.device`), whose
runtime takes the process's signals (:mod:`.runtime`).

The original is closed. The rules are what is publicly known of it, and each names where from:

- S: sendnn-inference 2.6.3, which runs on cards; paths are inside its package.
- PR#, issue#: numbers in that project's repository, torch-spyre/sendnn-inference.
- A: aiu-fms-testing-utils, IBM's own tests of FMS on cards.
- F: ibm-fms 1.13.

What these do, the stand-in allows; what nothing is known of, it does not forbid.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed
from torch._dynamo import register_backend
from torch._dynamo.utils import counters

from torch_sendnn import runtime
from torch_sendnn.conformance import Limits, faults_of_run
from torch_sendnn.device import Device
from torch_sendnn.graphs import faults_of_graph, faults_of_outputs
from torch_sendnn.report import report
from torch_sendnn.variables import faults_of_environment

Named = dict[str, Any]
"""Inputs of a graph by placeholder name: tensors, and the integers of dynamic dimensions."""


@dataclass
class Record:
    """What happened, for the test to look at.

    Attributes:
        environment: all variables at import.
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

    def add_faults(self, faults: list[str]) -> None:
        """Remember faults, and report them to a test in another process."""
        self.faults += faults
        for fault in faults:
            report(f"fault: {fault}")

    def add_run(self, number: int, tensors: dict[str, torch.Tensor]) -> bool:
        """Remember a run of a graph; returns whether it is the graph's first of its kind."""
        known = {run for run, in_warmup, _ in self.runs if in_warmup == self.in_warmup}
        if number not in known:
            report(f"graph {number} {'in warmup' if self.in_warmup else 'deployed'}")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.runs.append((number, self.in_warmup, shapes))
        return number not in known


class DtException(RuntimeError):
    """What the card's software raises."""


record = Record(dict(os.environ))
device = Device()
runtime.take_signals()
report("imported")
for name in (*runtime.CARDS, "MASTER_PORT"):
    if name in record.environment:
        report(f"{name}={record.environment[name]}")


@register_backend(name="sendnn")
def compile_graph(
    graph: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend: keeps the graph's inputs and runs it with PyTorch."""
    number = len(record.graphs)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    symbolic = {node.name: node.meta.get("example_value") for node in placeholders}
    record.graphs.append(symbolic)
    record.add_faults(faults_of_graph(symbolic, options))
    world_size = distributed.get_world_size() if distributed.is_initialized() else 1
    record.add_faults(faults_of_environment(record.environment, world_size))
    if not record.in_warmup:
        record.compiled_outside += 1
        _raise_if(record.fail_compiling, symbolic)
    limits = Limits.from_environment(record.environment)
    computed: list[Any] = []  # by the first run of the deployed program

    def run(*inputs: Any) -> Any:
        named = dict(zip(symbolic, inputs, strict=True))
        tensors = {name: each for name, each in named.items() if isinstance(each, torch.Tensor)}
        is_first = record.add_run(number, tensors)
        if computed and not runtime.COMPUTES:
            runtime.call_device(deploys=False)
            return device.made_up(named, computed)
        record.add_faults(faults_of_run(symbolic, named, limits))
        _raise_if(record.fail_running, named)
        loaded, faults = device.load(named, record.in_warmup)
        if not record.in_warmup:
            runtime.call_device(deploys=is_first)
        outputs = graph(*loaded)
        record.add_faults([*faults, *faults_of_outputs(symbolic, outputs)])
        if not record.in_warmup:
            computed[:] = outputs
        return device.store(outputs)

    return run


def _raise_if(fails: Callable[[Named], str | None] | None, named: Named) -> None:
    said = fails(named) if fails is not None else None
    if said:
        raise DtException(said)


@contextlib.contextmanager
def warmup_mode() -> Iterator[None]:
    """Graphs are made inside, and compiled when it is left (S ``v1/worker/spyre_worker.py:74``)."""
    first, traced = len(record.graphs), counters["stats"]["unique_graphs"]
    record.warmups += 1
    record.in_warmup = True
    try:
        yield
    finally:
        record.in_warmup = False
    # S warms up nothing else inside; what another compiler does there is unknown.
    others = counters["stats"]["unique_graphs"] - traced - (len(record.graphs) - first)
    if others:
        record.add_faults([f"{others} graphs of another compiler were made in warmup mode"])
    for symbolic in record.graphs[first:]:
        _raise_if(record.fail_compiling, symbolic)

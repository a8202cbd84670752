# SPDX-License-Identifier: Apache-2.0
"""Stands in for the card's compiler: runs each graph as it is, and keeps what it was given.

Importable as ``torch_sendnn`` where a test puts its folder on the path. Like the original it reads
``VLLM_DT_*`` when it is imported, and registers the ``torch.compile`` backend ``sendnn``.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo import register_backend


@dataclass
class Record:
    """What happened, for the test to look at.

    Attributes:
        environment: ``VLLM_DT_*`` at import.
        graphs: the inputs of each compiled graph, by placeholder name.
        warmups: how often warmup mode was entered.
        in_warmup: whether it is active.
        compiled_outside: graphs compiled outside warmup mode.
        runs: shapes of the graph's inputs and whether warmup mode was active, for each run.
    """

    environment: dict[str, str]
    graphs: list[dict[str, Any]] = field(default_factory=list)
    warmups: int = 0
    in_warmup: bool = False
    compiled_outside: int = 0
    runs: list[tuple[int, bool, tuple[tuple[int, ...], ...]]] = field(default_factory=list)


record = Record({name: value for name, value in os.environ.items() if name.startswith("VLLM_DT_")})


@register_backend(name="sendnn")
def compile_graph(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """The backend: keeps the graph's inputs and runs it with PyTorch."""
    number = len(record.graphs)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    record.graphs.append({node.name: node.meta.get("example_value") for node in placeholders})
    record.compiled_outside += not record.in_warmup

    def run(*inputs: Any) -> Any:
        shapes = tuple(tuple(each.shape) for each in inputs if isinstance(each, torch.Tensor))
        record.runs.append((number, record.in_warmup, shapes))
        return graph(*inputs)

    return run


@contextlib.contextmanager
def warmup_mode() -> Iterator[None]:
    """Graphs are made inside."""
    record.warmups += 1
    record.in_warmup = True
    try:
        yield
    finally:
        record.in_warmup = False

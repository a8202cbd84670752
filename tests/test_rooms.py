# SPDX-License-Identifier: Apache-2.0
"""Imports run one way: a room imports those below it, and none of those above."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import vllm_spyre_mm

PACKAGE = Path(vllm_spyre_mm.__path__[0])

ROOMS = (
    *("cli", "doctor", "demo", "platform", "frontend", "payload", "vllm_fixes"),
    *("worker", "scheduler", "multimodal", "model_executor"),
    *("upstream", "host_memory", "host_cores", "compat", "environment", "config", "log"),
)
"""Folders and modules of the package from the top down; its entry points stand above them all."""


def imports_of(file: Path) -> Iterator[str]:
    """Names that a file imports, at its top and inside its functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_within() -> Iterator[tuple[str, str]]:
    """Each module of the package with each that it imports, as dotted paths inside the package."""
    modules = {
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
        for file in PACKAGE.rglob("*.py")
    }
    for module, file in modules.items():
        for name in imports_of(file):
            package, _, imported = name.partition(".")
            if package != PACKAGE.name:
                continue
            while imported and imported not in modules:  # what a module defines
                imported = imported.rpartition(".")[0]
            yield module, imported


def test_every_import_runs_downwards() -> None:
    files = (file.relative_to(PACKAGE).with_suffix("") for file in PACKAGE.rglob("*.py"))
    assert {file.parts[0] for file in files} - {"__init__"} == set(ROOMS)
    upwards = []
    for module, imported in imports_within():
        above, below = module.partition(".")[0], imported.partition(".")[0]
        if above in ROOMS and below in ROOMS and ROOMS.index(below) < ROOMS.index(above):
            upwards.append(f"{module} imports {imported}")
    assert not upwards


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, imported in imports_within():
        if imported and imported != module:
            graph.setdefault(module, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from None

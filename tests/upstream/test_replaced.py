# SPDX-License-Identifier: Apache-2.0
"""What is replaced of vLLM is what the hooks say that they replace, and it is not much."""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import vllm_spyre_mm

BOUND = 20
"""Of the attributes that are replaced."""

SCAN = """
import importlib, json, sys, types
from vllm.plugins import load_general_plugins

load_general_plugins()
import vllm.entrypoints.launchers.api_server.entry
import vllm.entrypoints.launchers.run_batch
import vllm.entrypoints.llm

# Hooks that still wait for their module.
for finder in [each for each in sys.meta_path if hasattr(each, "actions")]:
    importlib.import_module(finder.name)


def ours(value):
    \"\"\"The module of this package that made a function or class, and the thing; or None.\"\"\"
    if isinstance(value, classmethod | staticmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, types.FunctionType):
        name = value.__globals__["__name__"]
    elif isinstance(value, type):
        name = value.__module__
    else:
        return None
    return (name, id(value)) if name.startswith("vllm_spyre_mm.") else None


found = {}
seen = set()
for name, module in sorted(sys.modules.items()):
    if name != "vllm" and not name.startswith("vllm."):
        continue
    for attribute, value in list(vars(module).items()):
        if ours(value):
            found[f"{name}.{attribute}"] = ours(value)
        elif isinstance(value, type) and value.__module__.startswith("vllm.") and value not in seen:
            seen.add(value)
            path = f"{value.__module__}.{value.__qualname__}"
            for own, inner in list(vars(value).items()):
                if ours(inner):
                    found[f"{path}.{own}"] = ours(inner)
print(json.dumps(found))
"""
"""Prints what is ours among the attributes of vLLM's modules and classes, with whose it is."""


def declared() -> dict[str, set[str]]:
    """What each hook says that it replaces, by its module."""
    modules = (
        importlib.import_module(each.name)
        for each in pkgutil.walk_packages(vllm_spyre_mm.__path__, "vllm_spyre_mm.")
        if each.name.startswith(("vllm_spyre_mm.frontend.", "vllm_spyre_mm.vllm_fixes."))
    )
    return {
        module.__name__: set(module.REPLACED) for module in modules if hasattr(module, "REPLACED")
    }


def found() -> dict[str, set[str]]:
    """What is replaced in a fresh process, by the module that did it.

    One that other modules of vLLM's imported by name counts once, by the name that is declared.
    """
    ran = subprocess.run([sys.executable, "-c", SCAN], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    named = {name for names in declared().values() for name in names}
    places: dict[int, list[str]] = {}
    owners: dict[int, str] = {}
    for name, (owner, identity) in json.loads(ran.stdout.splitlines()[-1]).items():
        places.setdefault(identity, []).append(name)
        owners[identity] = owner
    result: dict[str, set[str]] = {}
    for identity, names in places.items():
        result.setdefault(owners[identity], set()).update(named.intersection(names) or names)
    return result


def test_what_is_replaced_is_declared_and_not_much() -> None:
    replaced = set().union(*found().values())
    assert replaced == set().union(*declared().values())
    assert len(replaced) <= BOUND


def test_the_page_lists_what_is_replaced() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    tables = page[page.index("## What is replaced of vLLM") :]
    rows = [line.split("|")[1:3] for line in tables.splitlines() if line.startswith("| `")]
    listed = {name for _, names in rows for name in re.findall(r"`([^`]+)`", names)}
    said = set().union(*declared().values())
    assert listed == {".".join(name.split(".")[-2:]) for name in said}
    assert f"\n{len(said)} attributes of vLLM's" in tables

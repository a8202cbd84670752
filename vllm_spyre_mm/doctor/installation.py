# SPDX-License-Identifier: Apache-2.0
"""Checks of the installation: Python, versions, the plugin, torchvision and the hooks."""

import importlib.metadata
import platform
import sys
from collections.abc import Iterator

from packaging.specifiers import SpecifierSet

from vllm_spyre_mm.doctor.finding import Finding
from vllm_spyre_mm.doctor.probe import ProbeError, probe
from vllm_spyre_mm.upstream.contract import (
    DISTRIBUTION,
    faulty_versions,
    requirements,
    untested_versions,
)

ANEW = "install it anew as docs/installation.md says, into an environment of its own"

UNTESTED = "nothing while it works; else install a version of the range"


def python() -> Iterator[Finding]:
    """The interpreter and the operating system."""
    running = platform.python_version()
    wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    if not SpecifierSet(wanted).contains(running):
        yield Finding(
            "python", "error", f"Python {running} is not Python{wanted}", f"use a Python{wanted}"
        )
    elif sys.platform != "linux":
        yield Finding("python", "error", f"{sys.platform} is not Linux", "use a Linux machine")
    else:
        yield Finding("python", "ok", f"Python {running} on {platform.machine()} Linux")


def versions() -> Iterator[Finding]:
    """Whether the installed distributions are within the declared version ranges."""
    faults = list(faulty_versions())
    for fault in faults:
        yield Finding("versions", "error", fault, ANEW)
    untested = list(untested_versions())
    for sentence in untested:
        yield Finding("versions", "warning", sentence, UNTESTED)
    if not faults and not untested:
        found = (f"{each.name} {importlib.metadata.version(each.name)}" for each in requirements())
        yield Finding("versions", "ok", ", ".join(found))


def plugin() -> Iterator[Finding]:
    """Whether vLLM would load the platform."""
    from vllm_spyre_mm.environment import another_spyre_plugin_contends, excluded_by_environment

    registered = {
        point.value.partition(":")[0]
        for point in importlib.metadata.entry_points(group="vllm.platform_plugins")
    }
    fault = None
    if "vllm_spyre_mm" not in registered:
        fault = ("vLLM does not see the plugin: its entry points are missing", ANEW)
    elif another_spyre_plugin_contends():
        fault = (
            "sendnn-inference is installed too, and vLLM runs one platform",
            "set VLLM_PLUGINS=spyre_mm, or uninstall one of them",
        )
    else:
        fault = excluded_by_environment()
    if fault:
        yield Finding("plugin", "error", *fault)
    else:
        yield Finding("plugin", "ok", "vLLM sees the platform")


def torchvision() -> Iterator[Finding]:
    """Whether torchvision imports; vLLM's image processors need it, not its operators."""
    try:
        whole = probe("torchvision")["operators"]
    except ProbeError as error:
        yield Finding(
            "torchvision",
            "error",
            f"torchvision does not import: {error}",
            "install the torchvision that constraints.txt names",
        )
        return
    said = "whole" if whole else "for another PyTorch; its operators are declared without kernels"
    yield Finding("torchvision", "ok", f"imports ({said})")


def hooks() -> Iterator[Finding]:
    """Whether vLLM has the attributes that the hooks rely on."""
    try:
        found = probe("hooks")
    except ProbeError as error:
        yield Finding("hooks", "error", f"vLLM with the platform fails: {error}", ANEW)
        return
    if found["ours"]:
        yield Finding("hooks", "ok", "vLLM is as every hook expects it")
    else:
        yield Finding(
            "hooks",
            "error",
            f"vLLM's platform is {found['platform']}",
            "correct what the check `plugin` found",
        )

# SPDX-License-Identifier: Apache-2.0
"""A host with a card, or an image for one: its mode, devices, files, shared memory and versions.

What is looked at is handed in as a :class:`CardHost`. Its facts are those of public images.
"""

import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_spyre_mm.doctor.finding import Finding
from vllm_spyre_mm.doctor.host import available_cores, gib
from vllm_spyre_mm.environment import (
    card_mode,
    card_mode_fault,
    process_environment,
    runs_no_device,
)

SHM_BYTES = 2 << 30
"""Shared memory that several cards need at least."""

TORCH_OF = {"1.0": "2.7", "1.1": "2.7", "1.2": "2.10", "1.3": "2.11"}
"""The PyTorch that each public ``torch_sendnn`` is built for, both by their first two numbers."""

SETUP = "run the setup script of the image (a login shell does so)"

ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CardHost:
    """What the checks look at.

    Attributes:
        variables: the environment.
        machine: as ``platform.machine()`` names it.
        cores: counts those that this process may use, when a check asks.
        vfio: folder with the devices.
        senlib: configuration of the card's library.
        shm_bytes: size of the shared memory; 0 where there is none.
    """

    variables: Mapping[str, str]
    machine: str
    cores: Callable[[], int]
    vfio: Path
    senlib: Path
    shm_bytes: int

    @classmethod
    def here(cls) -> "CardHost":
        """This process's."""
        shm = Path("/dev/shm")
        return cls(
            variables=process_environment(),
            machine=platform.machine(),
            cores=available_cores,
            vfio=Path("/dev/vfio"),
            senlib=Path.home() / ".senlib.json",
            shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else 0,
        )

    @property
    def addresses(self) -> dict[int, str]:
        """PCI addresses of the cards by rank."""
        matches = ((re.fullmatch(r"AIU_WORLD_RANK_(\d+)", name), name) for name in self.variables)
        return {int(match[1]): self.variables[name] for match, name in matches if match}

    @property
    def num_ranks(self) -> int:
        """Cards, one at least."""
        return max(1, len(self.addresses))

    @property
    def has_traces(self) -> bool:
        """Whether anything of the card's software is here."""
        prefixes = ("FLEX_", "AIU_WORLD_", "SPYRE_DEVICES")
        named = any(name.startswith(prefixes) for name in self.variables)
        installed = importlib.util.find_spec("torch_sendnn") is not None
        return named or installed or self.senlib.exists()


def mode(host: CardHost) -> Iterator[Finding]:
    """What the runtime would run on."""
    said = card_mode_fault(host.variables)
    if said is None:
        yield Finding("mode", "ok", f"a card ({card_mode(host.variables)})")
        return
    wanted = "VF" if host.machine == "s390x" else "PF"
    do = f"for a card set FLEX_COMPUTE=SENTIENT and FLEX_DEVICE={wanted}"
    serves = host.variables.get("FLEX_DEVICE") != "COMPILE"
    yield Finding("mode", "warning" if serves else "error", said, do)


def devices(host: CardHost) -> Iterator[Finding]:
    """Whether the cards are there, each with its address."""
    if runs_no_device(host.variables):
        yield Finding("devices", "ok", "none are needed in this mode")
        return
    faults = [*_faults_of_devices(host), *_faults_of_addresses(host)]
    for said, do in faults:
        yield Finding("devices", "error", said, do)
    if not faults:
        listed = ", ".join(host.addresses[rank] for rank in sorted(host.addresses))
        said = f"{listed}: --tensor-parallel-size {len(host.addresses)} at most"
        yield Finding("devices", "ok", said)


def _faults_of_devices(host: CardHost) -> Iterator[tuple[str, str]]:
    do = "start the container with the devices of its cards, all of /dev/vfio for instance"
    groups = [each for each in host.vfio.glob("*") if each.name != "vfio"]
    if not host.vfio.is_dir():
        yield f"there is no {host.vfio}", do
    elif len(groups) < host.num_ranks:
        yield f"{host.vfio} holds {len(groups)} devices for {host.num_ranks} cards", do
    listed = [each for each in host.variables.get("SPYRE_DEVICES", "").split(",") if each.strip()]
    if listed and len(listed) < host.num_ranks:
        said = f"SPYRE_DEVICES lists {len(listed)} devices for {host.num_ranks} cards"
        yield said, "list as many as there are AIU_WORLD_RANK_n, or unset it"


def _faults_of_addresses(host: CardHost) -> Iterator[tuple[str, str]]:
    ranks, size = sorted(host.addresses), host.variables.get("AIU_WORLD_SIZE")
    if not ranks:
        do = f"{SETUP}, or set it to the PCI address of the card, such as 0000:1a:00.0"
        yield "AIU_WORLD_RANK_0 is not set: no card is named", do
        return
    if ranks != [*range(len(ranks))]:
        yield f"AIU_WORLD_RANK_n are set for {ranks}", "number them from 0 without a gap"
    for rank, address in sorted(host.addresses.items()):
        if not ADDRESS.fullmatch(address):
            said = f"AIU_WORLD_RANK_{rank}={address!r} is no PCI address"
            yield said, "give it as 0000:1a:00.0"
    if len(set(host.addresses.values())) < len(ranks):
        yield "two AIU_WORLD_RANK_n name one card", "give each rank a card of its own"
    if size is not None and size != str(len(ranks)):
        said = f"AIU_WORLD_SIZE={size} does not count the {len(ranks)} AIU_WORLD_RANK_n"
        yield said, SETUP


def senlib(host: CardHost) -> Iterator[Finding]:
    """Whether the library's configuration is there, with what the images turn off."""
    if not host.senlib.is_file():
        do = f"{SETUP}, which writes it; as another user copy it into your home folder"
        yield Finding("senlib", "error", f"there is no {host.senlib.name} in the home folder", do)
        return
    try:
        stored = json.loads(host.senlib.read_text())
    except ValueError as error:
        said = f"{host.senlib.name} is not JSON: {error}"
        yield Finding("senlib", "error", said, SETUP)
        return
    wrong = []
    if not _is_off([value for key, value in _entries(stored) if key == "ENABLE_RISCV"]):
        wrong.append(('ENABLE_RISCV is not "0x0"', 'set it to "0x0"'))
    dooms = [value for key, value in _entries(stored) if key.upper() == "DOOM"]
    enabled = [each.get("enable") for each in dooms if isinstance(each, dict)]
    if not _is_off(enabled or [False]):
        wrong.append(("doom is enabled", "set DOOM's enable to false"))
    for said, do in wrong:
        yield Finding("senlib", "warning", f"{said} in {host.senlib.name}", do)
    if not wrong:
        yield Finding("senlib", "ok", f"{host.senlib.name} has ENABLE_RISCV and doom off")


def _entries(stored: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep."""
    if isinstance(stored, dict):
        for key, value in stored.items():
            yield key, value
            yield from _entries(value)
    elif isinstance(stored, list):
        for each in stored:
            yield from _entries(each)


def _is_off(values: list[Any]) -> bool:
    """Whether there are values, and each means no."""
    return bool(values) and all(str(each).lower() in ("0", "0x0", "false") for each in values)


def shared_memory(host: CardHost) -> Iterator[Finding]:
    """Whether several ranks can talk."""
    said = f"{gib(host.shm_bytes)} GiB of /dev/shm for {host.num_ranks} cards"
    if host.num_ranks > 1 and host.shm_bytes < SHM_BYTES:
        do = f"start the container with {gib(SHM_BYTES)} GiB or more (--shm-size 2g)"
        yield Finding("shm", "error", said, do)
    else:
        yield Finding("shm", "ok", said)


def software(_: CardHost) -> Iterator[Finding]:
    """Whether ``torch_sendnn`` is here, with the PyTorch that it is built for."""
    torch = importlib.metadata.version("torch")
    try:
        sendnn = importlib.metadata.version("torch_sendnn")
    except importlib.metadata.PackageNotFoundError:
        said = "torch_sendnn, the card's compiler, is not installed, or without its metadata"
        do = "use an image that has it, and install vllm-spyre-mm into its Python"
        yield Finding("torch_sendnn", "error", said, do)
        return
    wanted = TORCH_OF.get(_two_numbers(sendnn))
    if wanted is None:
        said = f"torch_sendnn {sendnn} with torch {torch}: no pair with this version is public"
        do = "nothing if both come from one image"
        yield Finding("torch_sendnn", "warning", said, do)
    elif wanted != _two_numbers(torch):
        said = f"torch_sendnn {sendnn} goes with torch {wanted}, and {torch} is installed"
        do = f"install torch {wanted}, or take an image with another torch_sendnn"
        yield Finding("torch_sendnn", "error", said, do)
    else:
        yield Finding("torch_sendnn", "ok", f"torch_sendnn {sendnn} with torch {torch}")


def _two_numbers(version: str) -> str:
    return ".".join(version.split(".")[:2])

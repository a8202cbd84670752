# SPDX-License-Identifier: Apache-2.0
"""A host as an image for cards makes it, in a folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_spyre_mm.doctor.card import CardHost

SENLIB = {
    "SNT_MCI": {"DCR": {"MCI_CTRL": {"ENABLE_RISCV": "0x0"}}},
    "RISCV": {"DOOM": {"enable": False}},
}


def image(folder: Path, *, cards: int = 1, **changes: Any) -> CardHost:
    """Variables, devices and files of an image with cards, some of the fields changed."""
    vfio, senlib = folder / "vfio", folder / ".senlib.json"
    vfio.mkdir(parents=True)
    for name in ("vfio", *map(str, range(40, 40 + cards))):
        (vfio / name).touch()
    senlib.write_text(json.dumps(SENLIB))
    variables = {f"AIU_WORLD_RANK_{rank}": f"0000:{rank + 26:x}:00.0" for rank in range(cards)}
    variables |= {
        "AIU_WORLD_SIZE": str(cards),
        "FLEX_COMPUTE": "SENTIENT",
        "FLEX_DEVICE": "PF",
        "FLEX_OVERWRITE_NMB_FRAME": "true",
        "COMPILATION_MODE": "offline_decoder",
        "DTLOG_LEVEL": "error",
        "DT_PARALLEL_THREADS": "4",
    }
    host = CardHost(variables, "x86_64", lambda: 16, vfio, senlib, 2 << 30)
    return replace(host, **changes)


def with_variables(host: CardHost, **changes: str | None) -> CardHost:
    """The same host with variables set, or unset by None."""
    changed = {**host.variables, **changes}
    return replace(host, variables={k: v for k, v in changed.items() if v is not None})

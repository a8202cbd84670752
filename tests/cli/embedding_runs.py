# SPDX-License-Identifier: Apache-2.0
"""Runs of ``vllm-spyre-mm embed``, and what they wrote."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file

from vllm_spyre_mm.cli import main


def run(folder: Path, output: Path, *more: str) -> int:
    return main(["embed", str(folder), "-o", str(output), "--eager", "--shard-size", "3", *more])


def shards_of(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"features-0*{output.suffix}"))


def read_shard(file: Path) -> dict[str, torch.Tensor]:
    """All of a shard, as its users open it."""
    if file.suffix == ".safetensors":
        return load_file(file)
    cache = str(file.parent / "cache")
    table = Dataset.from_parquet(str(file), cache_dir=cache).with_format("torch")
    return {row["path"]: row["features"] for row in table}


def read(output: Path) -> dict[str, torch.Tensor]:
    """Everything that the index names, from where it says."""
    index = json.loads(Path(f"{output}.index.json").read_text())
    shards = {name: read_shard(output.with_name(name)) for name in index["weight_map"].values()}
    return {name: shards[file][name] for name, file in index["weight_map"].items()}


Features = list[torch.Tensor]


class Tower:
    """Stands between the model and what is done with its features."""

    def __init__(self) -> None:
        self.change: Callable[[Features], Features] = list
        self.counts: list[int] = []

    def __call__(self, features: Features) -> Features:
        self.counts += map(len, features)
        return self.change(features)

# SPDX-License-Identifier: Apache-2.0
"""Files of features: shards that are written atomically, and an index of them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 1 << 30
"""A shard is written when its features reach this, however few pictures it has."""


class ShardWriteError(RuntimeError):
    """A shard or the index cannot be written: the disk is full, for instance."""


class ShardFormat(Protocol):
    """A file format. ``made_with`` are the options that the features depend on."""

    suffix: str

    def read(self, file: Path) -> tuple[list[str], dict[str, str]]:
        """Names of the pictures in a shard, and its ``made_with``."""

    def write(
        self, file: Path, features: "Mapping[str, torch.Tensor]", made_with: dict[str, str]
    ) -> None:
        """Write a shard; features are ``(rows, hidden_size)`` each."""


class SafetensorsFormat:
    """Safetensors with a tensor for each picture, under its name."""

    suffix = ".safetensors"

    def read(self, file: Path) -> tuple[list[str], dict[str, str]]:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as shard:
            return list(shard.keys()), shard.metadata()

    def write(
        self, file: Path, features: "Mapping[str, torch.Tensor]", made_with: dict[str, str]
    ) -> None:
        from safetensors.torch import save_file

        save_file(dict(features), file, made_with)


class ParquetFormat:
    """Parquet with a row for each picture: ``path``, and ``features`` as a list of rows.

    Arrow has no bfloat16; such features become float32.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """

    suffix = ".parquet"

    def __init__(self) -> None:
        import importlib.util

        if importlib.util.find_spec("pyarrow") is None:
            raise ModuleNotFoundError(
                "Parquet needs pyarrow: pip install 'vllm-spyre-mm[parquet]', or write "
                "FILE.safetensors"
            )

    def read(self, file: Path) -> tuple[list[str], dict[str, str]]:
        import pyarrow.parquet as pq

        table = pq.read_table(file, columns=["path"])
        metadata = table.schema.metadata or {}
        return table.column("path").to_pylist(), json.loads(metadata.get(b"made_with", b"{}"))

    def write(
        self, file: Path, features: "Mapping[str, torch.Tensor]", made_with: dict[str, str]
    ) -> None:
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq
        import torch

        rows = torch.cat(list(features.values()))
        flat = (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()
        ends = np.cumsum([0, *(len(each) for each in features.values())], dtype=np.int32)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
        table = pa.table(
            {"path": list(features), "features": pa.ListArray.from_arrays(pa.array(ends), vectors)}
        )
        table = table.replace_schema_metadata({"made_with": json.dumps(made_with)})
        pq.write_table(table, file, use_dictionary=["path"])


def shard_format(output: Path) -> ShardFormat:
    """The format that a file's name asks for; safetensors for a name without a suffix.

    Raises:
        ValueError: there is no such format.
    """
    formats: dict[str, type[ShardFormat]] = {
        "": SafetensorsFormat,
        ".safetensors": SafetensorsFormat,
        ".parquet": ParquetFormat,
    }
    if output.suffix not in formats:
        raise ValueError(
            f"{output}: features are written as .safetensors or .parquet, not {output.suffix}"
        )
    return formats[output.suffix]()


class Shards:
    """Files with an index beside them, in the layout of a sharded checkpoint.

    A shard is written under another name and then renamed. The pictures of an earlier run are read
    from the shards themselves.

    Args:
        output: ``FILE.safetensors`` or ``FILE.parquet``.
        size: pictures in a shard.
        made_with: options that the features depend on; stored in every shard.

    Raises:
        OSError: the output's folder cannot be read.
        ValueError: shards are there that were made with something else, or cannot be read.
    """

    def __init__(self, output: Path, size: int, made_with: dict[str, str]) -> None:
        self.format = shard_format(output)
        self.output = output.with_suffix(self.format.suffix)
        self.size, self.made_with = size, made_with
        self.index: dict[str, str] = {}
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        name = re.compile(rf"{re.escape(self.output.stem)}-(\d{{5,}}){self.output.suffix}")
        found = [(name.fullmatch(file.name), file) for file in self.output.parent.iterdir()]
        shards = sorted((int(match[1]), file) for match, file in found if match is not None)
        for _, file in shards:
            self.index |= dict.fromkeys(self._pictures_in(file), file.name)
        self._number = shards[-1][0] if shards else 0

    def _pictures_in(self, file: Path) -> list[str]:
        from safetensors import SafetensorError

        try:
            names, found = self.format.read(file)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}): if it is damaged, delete it, and its pictures "
                "are encoded again"
            ) from None
        if found != self.made_with:
            raise ValueError(
                f"{file} was made with {found}, not {self.made_with}: choose another output or "
                "delete it"
            )
        return names

    @property
    def index_file(self) -> Path:
        """The file that maps pictures to shards."""
        return self.output.with_name(f"{self.output.name}.index.json")

    def add(self, name: str, features: "torch.Tensor") -> None:
        """Add one picture's features, ``(rows, hidden_size)``.

        Raises:
            ShardWriteError: the shard that it completes cannot be written.
        """
        self._waiting[name] = features
        self._waiting_bytes += features.nbytes
        if len(self._waiting) >= self.size or self._waiting_bytes >= MAX_SHARD_BYTES:
            self._write()

    def finish(self) -> None:
        """Write what is left, and the index.

        Raises:
            ShardWriteError: one of them cannot be written.
        """
        if self._waiting:
            self._write()
        index = {"metadata": self.made_with, "weight_map": self.index}
        _replace(self.index_file, lambda file: file.write_text(json.dumps(index, indent=1)))

    def _write(self) -> None:
        self._number += 1
        name = f"{self.output.stem}-{self._number:05}{self.output.suffix}"
        features, self._waiting, self._waiting_bytes = self._waiting, {}, 0
        _replace(
            self.output.with_name(name),
            lambda unfinished: self.format.write(unfinished, features, self.made_with),
        )
        self.index |= dict.fromkeys(features, name)


def _replace(file: Path, write: Any) -> None:
    """Write a file atomically: under another name, then renamed.

    Raises:
        ShardWriteError: says why, and what to do.
    """
    from safetensors import SafetensorError

    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        write(unfinished)
        unfinished.replace(file)
    except (OSError, SafetensorError) as error:
        raise ShardWriteError(
            f"{file} cannot be written: {error}. The shards before it are whole: make room and run "
            "the same command again, which goes on after them"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)

# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: finding them, listing their tensors, and comparing these with the model's."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig

MAX_NAMES_SHOWN = 8
"""Names that an error lists of each kind of fault."""

ELEMENTS_AT_ONCE = 1 << 20
"""Elements of a tensor that are summed together."""

INDEX = "model.safetensors.index.json"
"""File that maps tensors to files, in a checkpoint of several."""

MISTRAL_FORMAT = "consolidated*.safetensors"
"""Weights in Mistral's own format, which its repositories hold beside those of Hugging Face."""

ADAPTER = "adapter_config.json"
"""Describes a LoRA adapter beside the weights."""


class CheckpointError(ValueError):
    """A checkpoint does not hold exactly what the model needs."""


def find_checkpoint(model_config: "ModelConfig", load_config: "LoadConfig") -> Path:
    """The local folder of a checkpoint, downloaded first where the model is a hub name.

    Raises:
        CheckpointError: there are no safetensors in it; see :func:`weight_files`.
    """
    path = Path(model_config.model)
    if not path.is_dir():
        from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf
        from vllm.transformers_utils.repo_utils import file_or_path_exists

        if file_or_path_exists(model_config.model, ADAPTER, model_config.revision):
            _refuse_adapter(path)
        ignored = load_config.ignore_patterns
        path = Path(
            download_weights_from_hf(
                model_config.model,
                load_config.download_dir,
                allow_patterns=["*.safetensors"],  # those that the index names, if there is one
                revision=model_config.revision,
                ignore_patterns=[
                    *([ignored] if isinstance(ignored, str) else ignored),
                    MISTRAL_FORMAT,
                ],
            )
        )
    weight_files(path)
    return path


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files of a checkpoint.

    Attributes:
        folder: of the checkpoint.
        read: names of the files that are read, sorted.
        indexed: by file, the tensors that the index places in it; None without an index, when every
            tensor of each file is read.
        absent: names of files that the index names and that do not exist.
        left_out: names of safetensors files that are not read.
        mistral_format: whether those that are read are in Mistral's own format.
    """

    folder: Path
    read: tuple[str, ...]
    indexed: Mapping[str, frozenset[str]] | None
    absent: tuple[str, ...]
    left_out: tuple[str, ...]
    mistral_format: bool = False

    def __str__(self) -> str:
        """The files, for the end of an error message."""
        parts = [f"read: {listed(self.read)}"]
        if self.indexed is not None:
            parts[0] += f" (as {INDEX} says)"
        if self.absent:
            parts.append(f"named there, but absent: {listed(self.absent)}")
        if self.left_out:
            parts.append(f"left out: {listed(self.left_out)}")
        return "; ".join(parts)


def weight_files(folder: Path) -> WeightFiles:
    """The files that hold a checkpoint's weights: those that its index names and no others.

    Without an index they are all safetensors of the folder; those in Mistral's own format only if
    there are no others.

    Raises:
        CheckpointError: there are none, the index cannot be read, or an adapter would be left out.
    """
    if (folder / ADAPTER).is_file():
        _refuse_adapter(folder)
    stored = {
        file.name
        for file in folder.glob("*.safetensors")
        if file.is_file() and not file.name.startswith(".")
    }
    indexed = _read_index(folder / INDEX)
    if indexed is None:
        read = {name for name in stored if not Path(name).match(MISTRAL_FORMAT)} or stored
        absent: set[str] = set()
    else:
        read = {name for name in indexed if (folder / name).is_file()}
        absent = indexed.keys() - read
    if not read:
        _refuse_nothing(folder, absent)
    return WeightFiles(
        folder,
        tuple(sorted(read)),
        indexed,
        absent=tuple(sorted(absent)),
        left_out=tuple(sorted(stored - read)),
        mistral_format=all(Path(name).match(MISTRAL_FORMAT) for name in read),
    )


def _refuse_adapter(model: Path) -> NoReturn:
    raise CheckpointError(
        f"{model} holds a LoRA adapter ({ADAPTER}), which would be left out: merge it into the "
        "weights with merge_and_unload() of PEFT, or take its files away"
    )


def _read_index(file: Path) -> dict[str, frozenset[str]] | None:
    """The tensors that an index places in each file; None if there is no index."""
    if not file.is_file():
        return None
    tensors: dict[str, set[str]] = {}
    try:
        for name, stored_in in json.loads(file.read_text())["weight_map"].items():
            tensors.setdefault(stored_in, set()).add(name)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be read, and it says which files hold the weights: {error!r}"
        ) from error
    return {stored_in: frozenset(names) for stored_in, names in tensors.items()}


def _refuse_nothing(folder: Path, absent: set[str]) -> NoReturn:
    if absent:
        raise CheckpointError(
            f"none of the files that {INDEX} names is in {folder}: {listed(sorted(absent))}"
        )
    raise CheckpointError(
        f"{folder} has no *.safetensors: convert the checkpoint with "
        "model.save_pretrained(..., safe_serialization=True) of transformers"
    )


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a checkpoint file that has not been read yet.

    Attributes:
        stored_name: its name in the file.
        file: the file's name.
        shape: its shape.
        read: reads it from the file, in the dtype it is stored in, to the CPU.
    """

    stored_name: str
    file: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    def __str__(self) -> str:
        return f"{self.stored_name} in {self.file}"


def open_checkpoint(
    files: WeightFiles,
    rename: Callable[[str], str],
    convert: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint by renamed name; reads headers only.

    Args:
        files: of the checkpoint.
        rename: maps a stored name to the one that FMS's adapter knows.
        convert: called with the new name and a tensor that was read; the shape stays.

    Raises:
        CheckpointError: a file cannot be read, or two tensors mean the same parameter.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, StoredTensor] = {}
    for file in files.read:
        try:
            handle = safe_open(files.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        for stored_name in handle.keys():  # noqa: SIM118 - not a mapping
            if files.indexed is not None and stored_name not in files.indexed[file]:
                continue
            name = rename(stored_name)
            read: Callable[[], torch.Tensor] = functools.partial(handle.get_tensor, stored_name)
            if convert is not None:
                read = functools.partial(_read_and_convert, read, functools.partial(convert, name))
            shape = tuple(handle.get_slice(stored_name).get_shape())
            tensor = StoredTensor(stored_name, file, shape, read)
            if name in tensors:
                raise CheckpointError(
                    f"{files.folder} holds {name} twice: as {tensors[name]} and as {tensor}; keep "
                    f"one of them, or say in {INDEX} which files are read"
                )
            tensors[name] = tensor
    return tensors


def _read_and_convert(
    read: Callable[[], torch.Tensor], convert: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    return convert(read())


def check_complete(
    files: WeightFiles,
    adapted: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
) -> None:
    """Compare the tensors of a checkpoint with those of a model.

    Args:
        files: of the checkpoint, for the message.
        adapted: the checkpoint's tensors under the model's names; only their shapes are used.
        expected: the model's parameters and buffers.

    Raises:
        CheckpointError: names what is missing, unexpected or wrongly shaped.
    """
    missing = sorted(expected.keys() - adapted.keys())
    unexpected = sorted(adapted.keys() - expected.keys())
    misshapen = sorted(
        f"{name} (stored {tuple(adapted[name].shape)}, needed {tuple(expected[name].shape)})"
        for name in adapted.keys() & expected.keys()
        if adapted[name].shape != expected[name].shape
    )
    raise_if_any(files, missing=missing, unexpected=unexpected, wrongly_shaped=misshapen)


def check_initialised(files: WeightFiles, model: nn.Module) -> None:
    """Raise :class:`CheckpointError` for parameters without storage, or with a NaN or infinity."""
    state = dict[str, Any](model.state_dict())
    raise_if_any(
        files,
        uninitialised=[name for name, tensor in state.items() if tensor.is_meta],
        not_finite=[
            name
            for name, tensor in state.items()
            if not tensor.is_meta and tensor.is_floating_point() and not _is_finite(tensor)
        ],
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    # A sum is NaN or infinite if an element is. It may overflow by itself in a narrow dtype, so it
    # is taken in fp32, of a part at a time: PyTorch converts before it adds.
    parts = tensor.flatten().split(ELEMENTS_AT_ONCE)
    return all(bool(torch.isfinite(part.sum(dtype=torch.float32))) for part in parts)


def raise_if_any(files: WeightFiles, **faults: list[str]) -> None:
    """Raise :class:`CheckpointError` with the names under each kind of fault, if there are any."""
    parts = [
        f"{kind.replace('_', ' ')}: {listed(names)}" for kind, names in faults.items() if names
    ]
    if parts:
        raise CheckpointError(
            f"the checkpoint in {files.folder} cannot be served; {'; '.join(parts)}; {files}"
        )


def listed(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return f"{', '.join(names[:MAX_NAMES_SHOWN])}{more}"

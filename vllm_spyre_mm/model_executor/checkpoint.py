# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: where they are, what is in them, and whether that is what a model needs."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig

MAX_NAMES_SHOWN = 8
"""Names that an error lists of each kind of fault."""


ELEMENTS_AT_ONCE = 1 << 20
"""Elements of a tensor that are looked at together."""


class CheckpointError(ValueError):
    """A checkpoint does not hold exactly what the model needs."""


def find_checkpoint(model_config: "ModelConfig", load_config: "LoadConfig") -> Path:
    """The local folder of a checkpoint, downloaded first where the model is a hub name.

    Raises:
        CheckpointError: there are no safetensors in it.
    """
    path = Path(model_config.model)
    if not path.is_dir():
        from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

        path = Path(
            download_weights_from_hf(
                model_config.model,
                load_config.download_dir,
                allow_patterns=["*.safetensors"],
                revision=model_config.revision,
                ignore_patterns=load_config.ignore_patterns,
            )
        )
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{path} has no *.safetensors: convert the checkpoint with "
            "model.save_pretrained(..., safe_serialization=True) of transformers"
        )
    return path


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a checkpoint file that has not been read yet.

    Attributes:
        stored_name: its name in the file.
        shape: its shape.
        read: reads it from the file, in the dtype it is stored in, to the CPU.
    """

    stored_name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def open_checkpoint(path: Path, rename: Callable[[str], str]) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint folder by renamed name; reads headers only.

    Args:
        path: folder with ``*.safetensors``.
        rename: gives a stored name in the model's one layout.

    Raises:
        CheckpointError: a file cannot be read, or two tensors mean the same parameter.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, StoredTensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        if file.name == "consolidated.safetensors":
            continue  # Mistral's own copy of the same weights
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file.name} cannot be read: {error}") from error
        for stored_name in handle.keys():  # noqa: SIM118 - not a mapping
            name = rename(stored_name)
            if name in tensors:
                raise CheckpointError(
                    f"{path} holds {name} twice: as {tensors[name].stored_name} and {stored_name}"
                )
            tensors[name] = StoredTensor(
                stored_name,
                tuple(handle.get_slice(stored_name).get_shape()),
                functools.partial(handle.get_tensor, stored_name),
            )
    return tensors


def check_complete(
    path: Path,
    adapted: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
) -> None:
    """Compare what a checkpoint would put into a model with what the model has.

    Args:
        path: the checkpoint, for the message.
        adapted: the checkpoint's tensors under the model's names (no data is looked at).
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
    raise_if_any(path, missing=missing, unexpected=unexpected, wrongly_shaped=misshapen)


def check_initialised(path: Path, model: nn.Module) -> None:
    """Raise :class:`CheckpointError` for parameters without storage, or with a NaN or infinity."""
    state = dict[str, Any](model.state_dict())
    raise_if_any(
        path,
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


def raise_if_any(path: Path, **faults: list[str]) -> None:
    """Raise :class:`CheckpointError` with the names under each kind of fault, if there are any."""
    parts = []
    for kind, names in faults.items():
        if names:
            shown = ", ".join(names[:MAX_NAMES_SHOWN])
            more = (
                f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
            )
            parts.append(f"{kind.replace('_', ' ')}: {shown}{more}")
    if parts:
        raise CheckpointError(f"the checkpoint in {path} cannot be served; {'; '.join(parts)}")

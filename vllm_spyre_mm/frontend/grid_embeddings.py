# SPDX-License-Identifier: Apache-2.0
"""Ready-made features that come with their grid, in vLLM's form.

The features of all items of a modality are one tensor, ``image_embeds`` or ``video_embeds``
``(features of all items, width)``. ``image_grid_thw`` or ``video_grid_thw``, ``(items, 3)``, says
for each how many frames (pairs of them, of a video), rows and columns of patches it has; squares
of ``spatial_merge_size`` patches a side became one feature. Some models need the seconds of a
video's frames in ``timestamps`` too. One item may be given without the axis of items.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.multimodal.media.image import ImageEmbeddingMediaIO

from vllm_spyre_mm.multimodal.feature_check import fault_of_embedding
from vllm_spyre_mm.vllm_fixes.media_errors import bytes_error

SECONDS = ("timestamps", "second_per_grid_ts")
MOST_SECONDS = 1e6
MOST_NUMBERS = 100_000
"""In a field beside the features, which has a few for each frame."""


@dataclass(frozen=True, slots=True)
class GridForm:
    """How a model takes the features of one modality.

    Attributes:
        modality: vLLM's name.
        required: fields that are needed.
        optional: fields that may be left out.
        merge: ``spatial_merge_size`` of the tower.
        width: elements of a feature, its levels included.
    """

    modality: str
    required: frozenset[str]
    optional: frozenset[str]
    merge: int
    width: int

    @property
    def features(self) -> str:
        """Name of the field with the features."""
        return f"{self.modality}_embeds"

    @property
    def grid(self) -> str:
        """Name of the field with the grids."""
        return f"{self.modality}_grid_thw"

    def checked(self, given: object, indices: Iterable[int] | None = None) -> dict[str, Any]:
        """The features of all items of a modality as vLLM takes them.

        Args:
            given: one object for all of them, or a list with one for each.
            indices: where in the prompt those of a list are; None where they are all of its items.

        Raises:
            VLLMValidationError: says what is wrong with which.
        """
        if isinstance(given, Mapping):
            with self._named("embedding"):
                return self._checked(given)
        items = given if isinstance(given, (list, tuple)) else [given]
        each = []
        for index, one in zip(indices or itertools.count(), items, strict=False):
            with self._named(f"embedding {index}"):
                each.append(self._checked(one, alone=True))
        with self._named("embedding"):
            return self._joined(each)

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Names what an error is about."""
        from vllm.exceptions import VLLMValidationError

        try:
            yield
        except ValueError as error:
            raise VLLMValidationError(
                f"the {self.modality} {what} of the prompt cannot be used: it {error}",
                parameter=self.modality,
            ) from None

    def _joined(self, each: list[dict[str, Any]]) -> dict[str, Any]:
        names = set(each[0])
        if any(set(one) != names for one in each):
            raise ValueError("has objects of different fields: give all of them the same")
        joined: dict[str, Any] = {
            name: torch.cat([one[name] for one in each]) for name in (self.features, self.grid)
        }
        for name in names - joined.keys():
            joined[name] = [seconds for one in each for seconds in one[name]]
        return joined

    def _checked(self, given: object, alone: bool = False) -> dict[str, Any]:
        fault = self._fault_of_fields(given)
        if fault is not None or not isinstance(given, Mapping):
            raise ValueError(f"needs the fields {', '.join(sorted(self.required))}: it {fault}")
        grid = self._grid(given[self.grid])
        if alone and len(grid) != 1:
            raise ValueError(f"has {len(grid)} grids: give an object for each item of a list")
        features = self._features(given[self.features], grid)
        checked: dict[str, Any] = {self.features: features, self.grid: grid}
        for name in given.keys() & set(SECONDS):
            checked[name] = self._seconds(name, given[name], grid)
        return checked

    def _fault_of_fields(self, given: object) -> str | None:
        if not isinstance(given, Mapping):
            return "is no object"
        if missing := sorted(self.required - given.keys()):
            return f"lacks {', '.join(missing)}"
        unknown = sorted(set(map(str, given)) - self.required - self.optional)
        return f"has {', '.join(unknown)} too" if unknown else None

    def _grid(self, given: object) -> torch.Tensor:
        """The grids, int64 ``(items, 3)``."""
        grid = _as_tensor(given)
        if grid is not None and grid.ndim == 1:
            grid = grid.unsqueeze(0)
        if grid is None or grid.ndim != 2 or grid.shape[1] != 3 or not len(grid):
            raise ValueError(f"needs three numbers for each item in {self.grid}")
        if grid.is_floating_point() or grid.is_complex() or bool((grid <= 0).any()):
            raise ValueError(f"needs whole numbers from 1 on in {self.grid}")
        said = f"has a {self.grid} of {grid.tolist()}"
        if bool((grid[:, 1:] % self.merge).any()):
            raise ValueError(f"{said}: rows and columns are no multiples of {self.merge}")
        if self.modality == "image" and bool((grid[:, 0] != 1).any()):
            raise ValueError(f"{said}, but an image has one frame")
        return grid.long()

    def _features(self, given: object, grid: torch.Tensor) -> torch.Tensor:
        """The features, ``(num_features, width)``."""
        several = isinstance(given, (list, tuple)) and len(given) > 0
        tensors: Any = given if several else [given]
        for each in tensors:
            if not isinstance(each, torch.Tensor):
                raise ValueError(f"needs a tensor as {self.features}, not {type(each).__name__}")
            fault = fault_of_embedding(each, self.width)
            if fault is not None:
                raise ValueError(f"has {self.features} of shape {tuple(each.shape)}: {fault}")
        features = torch.cat(list(tensors))
        expected = sum(math.prod(each) for each in grid.tolist()) // self.merge**2
        if len(features) != expected:
            raise ValueError(
                f"has {len(features)} rows, but its {self.grid} of {grid.tolist()} stands for "
                f"{expected}"
            )
        return features

    def _seconds(self, name: str, given: Any, grid: torch.Tensor) -> list[Any]:
        """For each item its seconds: of every frame, or between two."""
        of_frames = name == "timestamps"
        lengths = grid[:, 0].tolist() if of_frames else [1] * len(grid)
        try:
            items: Any = [
                each.tolist() if isinstance(each, torch.Tensor) else each for each in given
            ]
            if of_frames and not any(isinstance(each, Iterable) for each in items):
                items = [items]
            seconds = [[*map(float, each)] if of_frames else [float(each)] for each in items]
        except (TypeError, ValueError):
            seconds = []
        good = all(0 <= second < MOST_SECONDS for each in seconds for second in each)
        if not good or [len(each) for each in seconds] != lengths:
            per = "frame of its grid" if of_frames else "video"
            raise ValueError(f"needs seconds from 0 on in {name}, one for each {per}")
        return seconds if of_frames else [torch.tensor(each[0]) for each in seconds]


def grid_form(modality: str, info: Any, *, width: int) -> GridForm | None:
    """How a model takes features of a modality; None where a tensor for each item is all.

    Args:
        modality: vLLM's name.
        info: vLLM's processing information of the model.
        width: elements of a feature, its levels included.
    """
    fields = info.data_parser.embedding_fields.get(modality)
    if not fields:
        return None
    vision = info.get_hf_config().vision_config
    told_seconds = modality == "video" and hasattr(vision, "tokens_per_second")
    optional = frozenset({"second_per_grid_ts"} if told_seconds else ())
    return GridForm(modality, frozenset(fields), optional, vision.spatial_merge_size, width)


def load_numbers(name: str, text: str) -> torch.Tensor:
    """Numbers beside the features of an embedding, from the base64 text of a serialized tensor.

    Args:
        name: of the field.
        text: what ``torch.save`` or ``numpy.save`` wrote.

    Raises:
        ValueError: it is none, or a large one.
    """
    what = f"the field {name!r} of an embedding"
    try:
        with bytes_error(what):
            numbers = ImageEmbeddingMediaIO().load_base64("", text)
    except MemoryError as error:
        raise ValueError(f"Failed to load {what}: it is too large to hold") from error
    plain = numbers.device.type == "cpu" and not numbers.is_quantized and numbers.ndim <= 2
    whole = plain and numbers.untyped_storage().nbytes() >= numbers.numel() * numbers.itemsize
    if not whole or numbers.numel() > MOST_NUMBERS:
        raise ValueError(f"Failed to load {what}: it is no short list of numbers")
    return numbers


def _as_tensor(given: object) -> torch.Tensor | None:
    if isinstance(given, torch.Tensor):
        return given
    try:
        return torch.tensor(given) if isinstance(given, (list, tuple)) else None
    except (ValueError, TypeError, OverflowError, RuntimeError):
        return None

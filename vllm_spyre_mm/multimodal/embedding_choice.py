# SPDX-License-Identifier: Apache-2.0
"""The choice of the embedding that a request gets back: items, rows, columns and dtype.

A request chooses with ``SamplingParams(extra_args={"return_mm_embedding": ...})``: true, false, or
an object with the fields of :class:`EmbeddingChoice`. The worker pools and converts, so that no
more is sent than was asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

    from vllm_spyre_mm.config import SpyreSettings

EXTRA_ARG = "return_mm_embedding"
"""Key of the choice in ``SamplingParams.extra_args``, and its field in HTTP requests."""

Pooling = Literal["raw", "image", "frame", "base", "grid"]
Levels = Literal["input", "all"]


@dataclass(frozen=True, slots=True)
class ItemSize:
    """How much an image or video has to give.

    Attributes:
        num_features: as merged.
        frames: of a video; 1 for an image.
    """

    num_features: int
    frames: int = 1


class EmbeddingChoice(BaseModel):
    """The embedding that a request asks for.

    Attributes:
        modalities: of the items that are wanted, by vLLM's names; None for all.
        pooling: ``raw``: the rows as the decoder got them. ``image``: the mean over all places of
            each item, one row. ``frame``: the mean of each frame of a video; an image is one
            frame. ``base``: the mean over the base tile, one row. ``grid``: means over a grid of
            equal cells laid over the finest features, row by row; of a video over all its frames.
        levels: columns of a row. ``all``: what replaces a text embedding, and the levels of
            deepstack beside it. ``input``: the former alone, ``hidden_size`` columns.
        grid: rows and columns of that grid.
        newlines: keep newline rows, which stand for no place (``raw`` only; means leave them out).
        dtype: of the tensor; ``auto`` is the encoder's. ``int8`` has a scale for each row (and
            level): an element is off by half a scale at most, which is 1/254 of the largest
            magnitude that shares the scale.
        generate: run the decoder. Without it the request ends after its prompt with a token that
            means nothing (``max_tokens`` must be 1), and costs the encoder alone.
        encoding_format: how an HTTP response carries it: ``base64``, or ``float`` for lists.
        max_bytes: refuse the request if its embedding would be larger; None for no bound.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    modalities: tuple[str, ...] | None = Field(default=None, strict=False, min_length=1)
    pooling: Pooling = "raw"
    levels: Levels = "all"
    grid: tuple[int, int] | None = Field(default=None, strict=False)
    newlines: bool = True
    dtype: Literal["auto", "float32", "float16", "bfloat16", "int8"] = "auto"
    generate: bool = True
    encoding_format: Literal["base64", "float"] = "base64"
    max_bytes: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fields_fit(self) -> "EmbeddingChoice":
        if (self.pooling == "grid") != (self.grid is not None):
            raise ValueError("grid, [rows, columns], is given with pooling 'grid' and only there")
        if self.grid is not None and not all(0 < extent <= 64 for extent in self.grid):
            raise ValueError("grid has 1 to 64 rows and columns")
        return self

    @property
    def needs_layout(self) -> bool:
        """Whether the choice depends on the place that each row stands for."""
        return self.pooling in ("frame", "base", "grid") or not self.newlines

    def wants(self, modality: str) -> bool:
        """Whether items of a modality are returned."""
        return self.modalities is None or modality in self.modalities

    def num_rows(self, items: Sequence[ItemSize]) -> int:
        """Rows of the tensor, newline rows counted.

        Args:
            items: those that are returned.
        """
        if self.pooling == "raw":
            return sum(item.num_features for item in items)
        if self.pooling == "frame":
            return sum(item.frames for item in items)
        cells = self.grid[0] * self.grid[1] if self.grid else 1
        return cells * len(items)

    def num_bytes(
        self, items: Sequence[ItemSize], hidden_size: int, width: int, encoder_dtype: str
    ) -> int:
        """Bytes of the tensor, newline rows counted, without the scales of int8.

        Args:
            items: those that are returned.
            hidden_size: of the decoder.
            width: elements of a feature, its levels included.
            encoder_dtype: the dtype that ``auto`` stands for.
        """
        dtype: torch.dtype = getattr(torch, encoder_dtype if self.dtype == "auto" else self.dtype)
        columns = hidden_size if self.levels == "input" else width
        return self.num_rows(items) * columns * dtype.itemsize


def parse_choice(value: object) -> EmbeddingChoice | None:
    """Parse a value of :data:`EXTRA_ARG`; None means no embedding.

    Raises:
        VLLMValidationError: says what is wrong with it (HTTP 400).
    """
    from vllm.exceptions import VLLMValidationError  # importing vLLM takes a second

    if isinstance(value, bool) or value in (0, 1):  # vLLM turns a JSON true into 1
        return EmbeddingChoice() if value else None
    if not isinstance(value, dict):
        raise VLLMValidationError(
            f"return_mm_embedding must be true, false or an object, not {type(value).__name__}",
            parameter=EXTRA_ARG,
        )
    try:
        return EmbeddingChoice.model_validate(value)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ")
            for fault in error.errors()
        )
        known = ", ".join(EmbeddingChoice.model_fields)
        raise VLLMValidationError(
            f"return_mm_embedding is invalid: {faults}. Its fields are: {known}.",
            parameter=EXTRA_ARG,
        ) from None


def choice_of(params: "SamplingParams | None", settings: "SpyreSettings") -> EmbeddingChoice | None:
    """A request's choice, from its parameters and the engine's settings; None for no embedding.

    Raises:
        VLLMValidationError: the choice is invalid, or the engine returns no embeddings (HTTP 400).
    """
    from vllm.exceptions import VLLMValidationError

    value = (params.extra_args or {}).get(EXTRA_ARG) if params is not None else None
    if value is None:
        value = settings.enable_return_mm_embedding and settings.return_mm_embedding_by_default
    choice = parse_choice(value)
    if choice is not None and not settings.enable_return_mm_embedding:
        raise VLLMValidationError(
            "return_mm_embedding is asked for, but this engine was started without it: start it "
            "with enable_return_mm_embedding=True or --enable-return-mm-embedding",
            parameter=EXTRA_ARG,
        )
    return choice

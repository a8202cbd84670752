# SPDX-License-Identifier: Apache-2.0
"""The embedding that a request gets back: the choice of its rows, pooling and dtype.

A request chooses with ``SamplingParams(extra_args={"return_mm_embedding": ...})``: true, false, or
an object with the fields of :class:`EmbeddingChoice`. The worker pools and converts, so that no
more is sent than was asked for.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_spyre_mm.multimodal.feature_check import dtype_name, max_magnitude, overflows
from vllm_spyre_mm.multimodal.feature_layout import FeatureLayout

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

    from vllm_spyre_mm.config import SpyreSettings

EXTRA_ARG = "return_mm_embedding"
"""Key of the choice in ``SamplingParams.extra_args``, and its field in HTTP requests."""

Pooling = Literal["raw", "image", "base", "grid"]


class EmbeddingChoice(BaseModel):
    """The embedding that a request asks for.

    Attributes:
        pooling: ``raw``: the rows as the decoder got them. ``image``: the mean over all places of
            each image, one row. ``base``: the mean over the base tile, one row. ``grid``: means
            over a grid of equal cells laid over the finest features, row by row.
        grid: rows and columns of that grid.
        newlines: keep newline rows, which stand for no place (``raw`` only; means leave them out).
        dtype: of the tensor; ``auto`` is the encoder's. ``int8`` has a scale for each row: an
            element is off by half a scale at most, which is 1/254 of the row's largest magnitude.
        generate: run the decoder. Without it the request ends after its prompt with a token that
            means nothing (``max_tokens`` must be 1), and costs the encoder alone.
        encoding_format: how an HTTP response carries it: ``base64``, or ``float`` for lists.
        max_bytes: refuse the request if its embedding would be larger; None for no bound.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    pooling: Pooling = "raw"
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
        return self.pooling in ("base", "grid") or not self.newlines

    def num_rows(self, features_per_image: Sequence[int]) -> int:
        """Rows of the tensor, newline rows counted.

        Args:
            features_per_image: number of merged features of each image.
        """
        if self.pooling == "raw":
            return sum(features_per_image)
        cells = self.grid[0] * self.grid[1] if self.grid else 1
        return cells * len(features_per_image)

    def num_bytes(
        self, features_per_image: Sequence[int], hidden_size: int, encoder_dtype: str
    ) -> int:
        """Bytes of the tensor, newline rows counted, without the scales of int8.

        Args:
            features_per_image: number of merged features of each image.
            hidden_size: elements in a row.
            encoder_dtype: the dtype that ``auto`` stands for.
        """
        dtype: torch.dtype = getattr(torch, encoder_dtype if self.dtype == "auto" else self.dtype)
        return self.num_rows(features_per_image) * hidden_size * dtype.itemsize


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


class MMEmbeddingItem(msgspec.Struct, frozen=True):
    """One image of an embedding.

    Attributes:
        modality: vLLM's name, ``image``.
        index: its index among the request's images, in prompt order.
        start: its first row in the tensor.
        end: one past its last row.
        offset: position of its placeholder in the prompt, in tokens.
        content_hash: vLLM's hash of the picture and of how it was processed.
        layout: the place of each of its features, before any pooling. None for an image that was
            given as an embedding.
    """

    modality: str
    index: int
    start: int
    end: int
    offset: int
    content_hash: str
    layout: FeatureLayout | None = None


class MMEmbeddingInfo(msgspec.Struct, frozen=True):
    """The image that each row of an embedding belongs to: ``CompletionOutput.mm_embedding_info``.

    Attributes:
        items: the images in prompt order.
        pooling: as chosen.
        scales: float32 ``(rows,)``, what each int8 row is multiplied by; None for other dtypes.
    """

    items: list[MMEmbeddingItem]
    pooling: str
    scales: torch.Tensor | None = None


def pool(
    features: torch.Tensor, layout: FeatureLayout | None, choice: EmbeddingChoice
) -> torch.Tensor:
    """Select or pool the features of one image, as chosen.

    Args:
        features: ``(num_features, hidden_size)``.
        layout: of the image; None where it is not known and ``choice.needs_layout`` is false.
        choice: which rows.

    Returns:
        ``(rows, hidden_size)``: the features themselves if all are chosen; means are fp32.
    """
    if choice.pooling == "raw" and choice.newlines:
        return features
    if layout is None:
        return features.float().mean(dim=0, keepdim=True)
    if choice.pooling == "raw":
        return features[layout.places()]
    if choice.pooling == "image":
        return features[layout.places()].float().mean(dim=0, keepdim=True)
    if choice.pooling == "base":
        return features[layout.base.indices().flatten()].float().mean(dim=0, keepdim=True)
    finest = layout.fine if layout.fine is not None else layout.base
    picture = features[finest.indices()].float().permute(2, 0, 1)
    return F.adaptive_avg_pool2d(picture, choice.grid).flatten(1).T


class EmbeddingOverflowError(ValueError):
    """The chosen dtype cannot hold an embedding's values; the message names one that can."""


def convert(rows: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Convert rows to the chosen dtype; also returns the scales of int8 rows.

    Args:
        rows: ``(rows, hidden_size)``.
        dtype: of :class:`EmbeddingChoice`.

    Raises:
        EmbeddingOverflowError: a value would become infinite.
    """
    if dtype == "auto":
        return rows, None
    if dtype != "int8":
        chosen: torch.dtype = getattr(torch, dtype)
        if overflows(rows, chosen):
            fits = "float32" if overflows(rows, torch.bfloat16) else "bfloat16"
            raise EmbeddingOverflowError(
                f"the embedding has values up to {max_magnitude(rows):.6g}, which {dtype} cannot "
                f"hold ({torch.finfo(chosen).max:.6g} at most): choose dtype {fits!r}"
            )
        return rows.to(chosen), None
    scales = rows.float().abs().amax(dim=1) / 127
    divisors = torch.where(scales > 0, scales, 1.0).unsqueeze(1)
    return (rows.float() / divisors).round().to(torch.int8), scales


def assemble(
    parts: Sequence[torch.Tensor],
    features: Sequence[Any],
    layouts: Sequence[FeatureLayout | None],
    choice: EmbeddingChoice,
) -> tuple[torch.Tensor, MMEmbeddingInfo]:
    """Make the embedding of a request from its images' features.

    Args:
        parts: features of each image, ``(num_features, hidden_size)``, in prompt order.
        features: vLLM's ``MultiModalFeatureSpec`` of each.
        layouts: of each.
        choice: what the request wants.

    Returns:
        ``(rows, hidden_size)``, contiguous memory of its own, and the image of each row.

    Raises:
        EmbeddingOverflowError: the chosen dtype cannot hold its values.
    """
    pooled = [pool(part, layout, choice) for part, layout in zip(parts, layouts, strict=True)]
    items, start = [], 0
    for index, (rows, feature, layout) in enumerate(zip(pooled, features, layouts, strict=True)):
        end = start + len(rows)
        content_hash = feature.mm_hash or feature.identifier
        offset = feature.mm_position.offset
        items.append(
            MMEmbeddingItem(feature.modality, index, start, end, offset, content_hash, layout)
        )
        start = end
    dtype: str = choice.dtype
    if dtype == "auto" and choice.pooling != "raw":  # means are computed in fp32
        dtype = dtype_name(parts[0].dtype)
    rows, scales = convert(torch.cat(pooled), dtype)
    return rows, MMEmbeddingInfo(items, choice.pooling, scales)

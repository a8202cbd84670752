# SPDX-License-Identifier: Apache-2.0
"""Checks of a vision encoder's output, shared by the worker and the command-line tools."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


EMBEDDING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that features may have."""


class FeatureError(RuntimeError):
    """The features of an image cannot be used; the message goes on after "was encoded to"."""


def check_features(
    features: torch.Tensor,
    num_features: int,
    width: int,
    merged_dtype: torch.dtype | None = None,
) -> None:
    """Check the features of one image.

    Args:
        features: the encoder's output, in its dtype.
        num_features: number of the image's features in the prompt.
        width: elements of a feature, its levels included.
        merged_dtype: the decoder's dtype, which they will be converted to; None without a decoder.

    Raises:
        FeatureError: they are no tensor of a dtype that features may have, not
            ``(num_features, width)``, not finite, or beyond what the decoder's dtype holds.
    """
    if not isinstance(features, torch.Tensor):  # a connector may bring anything
        raise FeatureError(f"a {type(features).__name__}, which is no tensor")
    if features.dtype not in EMBEDDING_DTYPES:
        raise FeatureError(
            f"features in {dtype_name(features.dtype)}, which is no floating-point dtype of 16 "
            "bits or more"
        )
    check_count(features, num_features)
    if features.shape[1] != width:
        raise FeatureError(
            f"features of {features.shape[1]} elements, but the model's have {width}: the "
            "configuration and the vision encoder do not fit each other"
        )
    # A sum is finite only if every summand is; one pass over the features.
    if not torch.isfinite(features.sum(dtype=torch.float32)):
        raise FeatureError(
            f"features with NaN or infinity in {dtype_name(features.dtype)}: the encoder may need "
            "encoder_dtype 'float32', or the checkpoint is damaged"
        )
    if merged_dtype is not None and overflows(features, merged_dtype):
        raise FeatureError(
            f"features up to {max_magnitude(features):.6g}, which the decoder's "
            f"{dtype_name(merged_dtype)} cannot hold: run this checkpoint on the CPU, with backend "
            "'inductor'"
        )


def check_count(features: torch.Tensor, num_features: int) -> None:
    """Check that the features of an image are as many as its placeholder in the prompt has.

    Raises:
        FeatureError: they are not ``(num_features, …)``.
    """
    if features.ndim != 2 or len(features) != num_features:
        raise FeatureError(
            f"features of shape {tuple(features.shape)}, but its placeholder in the prompt has "
            f"{num_features} positions"
        )


def check_item(
    item: "MultiModalFeatureSpec", features: torch.Tensor, width: int, merged_dtype: torch.dtype
) -> None:
    """Check the features of an item of a request; see :func:`check_features`."""
    check_features(features, item.mm_position.get_num_embeds(), width, merged_dtype)


def overflows(rows: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether finite rows have a value that is infinite in ``dtype``."""
    if torch.finfo(dtype).max >= torch.finfo(rows.dtype).max:
        return False
    return not bool(torch.isfinite(rows.to(dtype)).all())


def max_magnitude(rows: torch.Tensor) -> float:
    """The largest absolute value."""
    return float(rows.abs().max())


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name in settings and requests, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def fault_of_serialized_embedding(embedding: torch.Tensor) -> str | None:
    """Why a tensor that a client serialized is no embedding of an image; None if it may be one.

    Checked before anything is computed, so that a small request cannot make the server work on a
    large tensor.
    """
    if embedding.device.type != "cpu" or embedding.is_quantized:
        return "it is not a plain tensor on the CPU"
    if embedding.ndim != 2:
        return f"it has {embedding.ndim} dimensions, not 2"
    if embedding.untyped_storage().nbytes() < embedding.numel() * embedding.itemsize:
        return f"it has fewer elements than its shape says, {tuple(embedding.shape)}"
    return None


def fault_of_embedding(embedding: torch.Tensor, hidden_size: int) -> str | None:
    """Why the decoder cannot take an image's features; None if it can.

    Args:
        embedding: ``(num_features, hidden_size)``.
        hidden_size: of the decoder.
    """
    if embedding.ndim != 2:
        return f"it has {embedding.ndim} dimensions, not 2"
    if embedding.shape[1] != hidden_size:
        return f"its rows have {embedding.shape[1]} elements, the model's {hidden_size}"
    if not len(embedding):
        return "it has no rows"
    if embedding.dtype not in EMBEDDING_DTYPES:
        return f"its dtype is {embedding.dtype}, not a floating-point one of 16 bits or more"
    if not bool(embedding.isfinite().all()):
        return "it holds NaN or infinity"
    return None

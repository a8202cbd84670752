# SPDX-License-Identifier: Apache-2.0
"""What the worker and the encoder's process say to each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    from vllm_spyre_mm.model_executor.backend import StepSizes
    from vllm_spyre_mm.multimodal.mm_mappings import MMUtils


@dataclass(frozen=True, slots=True)
class EncoderJob:
    """What the process is for; the first message to it.

    Attributes:
        mapping: of the model.
        checkpoint: folder of the weights; None for random ones.
        seed: of random weights.
        encoder_dtype: of the encoder and of the features.
        decoder_dtype: what the features are converted to when they are merged.
        sizes: of the worker's steps.
        warmup: pictures that are encoded before any other, so that every graph is compiled.
    """

    mapping: "MMUtils"
    checkpoint: Path | None
    seed: int
    encoder_dtype: torch.dtype
    decoder_dtype: torch.dtype
    sizes: "StepSizes"
    warmup: "Sequence[MultiModalFeatureSpec]"


@dataclass(frozen=True, slots=True)
class Started:
    """The first message of the process.

    Attributes:
        fault: why it cannot encode; None if it can.
    """

    fault: str | None

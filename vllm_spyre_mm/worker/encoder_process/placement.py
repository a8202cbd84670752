# SPDX-License-Identifier: Apache-2.0
"""Whether an engine has an encoder's process, what that does, and which threads it gets."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vllm_spyre_mm.config import SpyreSettings, decoder_dtype_of
from vllm_spyre_mm.model_executor.backend import StepSizes
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils
from vllm_spyre_mm.upstream.processes import is_engine_process
from vllm_spyre_mm.worker.encoder_process.messages import EncoderJob

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec

WORKERS_SHARE = 4
"""The workers have one in so many of the host's threads while the encoder's process has the others:
they embed, merge and sample, and the card computes."""


def has_encoder_process(vllm_config: "VllmConfig", mapping: MMUtils) -> bool:
    """Whether pictures are encoded in a process of its own: where steps run on a card, which leaves
    the host's cores idle, and calls to which hold up the other threads of a process."""
    settings = SpyreSettings.from_vllm_config(vllm_config)
    if settings.backend != "sendnn" or not (settings.encode_ahead and mapping.modalities):
        return False
    limit = vllm_config.model_config.get_multimodal_config().get_limit_per_prompt
    return any(limit(modality) for modality in mapping.modalities)


def share_threads(num_threads: int, num_ranks: int) -> tuple[int, int]:
    """Threads of the encoder's process, and of each rank while it runs.

    Args:
        num_threads: of all of them together.
        num_ranks: of the model.
    """
    of_rank = max(1, num_threads // WORKERS_SHARE // num_ranks)
    return max(1, num_threads - num_ranks * of_rank), of_rank


def leave_threads(num_threads: int, num_ranks: int) -> int:
    """Keep this rank's share of the host's threads; returns those of the encoder's process.

    Comes before anything is compiled: Dynamo compiles anew for another number of threads.

    Args:
        num_threads: of all of them together.
        num_ranks: of the model.
    """
    of_encoder, of_rank = share_threads(num_threads, num_ranks)
    if is_engine_process():
        torch.set_num_threads(of_rank)
    return of_encoder


def encoder_job(
    vllm_config: "VllmConfig",
    mapping: MMUtils,
    checkpoint: Path | None,
    sizes: StepSizes,
    pictures: "Sequence[MultiModalFeatureSpec]",
) -> EncoderJob:
    """What the process of an engine does.

    Args:
        vllm_config: of the engine.
        mapping: of its model.
        checkpoint: folder of the weights; None for random ones.
        sizes: of the steps.
        pictures: of the warmup.
    """
    settings = SpyreSettings.from_vllm_config(vllm_config)
    return EncoderJob(
        mapping=mapping,
        checkpoint=checkpoint,
        seed=vllm_config.model_config.seed,
        encoder_dtype=getattr(torch, settings.encoder_dtype),
        decoder_dtype=decoder_dtype_of(vllm_config),
        sizes=sizes,
        warmup=pictures,
    )

# SPDX-License-Identifier: Apache-2.0
"""Checks of an engine whose encoder or decoder is elsewhere: EC connectors, an encoder alone."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_spyre_mm.config import SpyreSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_spyre_mm.multimodal.mm_mappings import MMUtils


def encodes_alone(engine_args: Any) -> bool:
    """Whether arguments of vLLM's are for an engine that runs the vision encoder alone.

    Args:
        engine_args: vLLM's ``EngineArgs``.
    """
    from vllm.config import ECTransferConfig

    transfer = engine_args.ec_transfer_config
    if isinstance(transfer, Mapping):  # vLLM makes one of it later
        transfer = ECTransferConfig(**transfer)
    return bool(engine_args.mm_encoder_only or (transfer is not None and transfer.is_encode_only))


def without_card(settings: SpyreSettings, enforce_eager: bool, can_compile: bool) -> SpyreSettings:
    """Settings of an engine without a decoder, which needs no card.

    Args:
        settings: not resolved.
        enforce_eager: vLLM's flag.
        can_compile: as for ``SpyreSettings.resolve``.

    Raises:
        ValueError: they ask for a card.
    """
    if settings.backend == "sendnn":
        raise ValueError(
            "backend='sendnn' runs a decoder on the card, and this engine runs the vision encoder "
            "alone: leave the backend out"
        )
    if settings.backend != "auto":
        return settings
    backend = "inductor" if can_compile and not enforce_eager else "eager"
    return settings.model_copy(update={"backend": backend})


def without_look_ahead(settings: SpyreSettings, vllm_config: "VllmConfig") -> SpyreSettings:
    """Settings with ``encode_ahead`` off for an engine in which nothing can be encoded ahead.

    A connector is asked in the step that needs an image; an encoder alone has no steps to encode
    beside; and pixels in shared memory are there from the step on in which a request is admitted.
    """
    multimodal = vllm_config.model_config.multimodal_config
    in_shared_memory = multimodal is not None and multimodal.mm_processor_cache_type == "shm"
    has_connector = vllm_config.ec_transfer_config is not None
    if has_connector or vllm_config.is_mm_encoder_only or in_shared_memory:
        return settings.model_copy(update={"encode_ahead": False})
    return settings


def check_encoder_transfer(
    vllm_config: "VllmConfig", settings: SpyreSettings, mapping: "MMUtils"
) -> None:
    """Check that what is asked of the encoder fits together.

    Raises:
        ValueError: says what does not.
    """
    transfer = vllm_config.ec_transfer_config
    if transfer is not None and mapping.image_token_id is None:
        raise ValueError(
            "an EC connector (--ec-transfer-config) moves features of images, and the model takes "
            "none"
        )
    if vllm_config.is_mm_encoder_only and vllm_config.parallel_config.tensor_parallel_size > 1:
        raise ValueError(
            "the vision encoder is not divided among ranks: leave --tensor-parallel-size out where "
            "an engine runs it alone"
        )
    only_consumes = (
        transfer is not None
        and transfer.is_ec_consumer
        and not transfer.is_ec_producer
        and not vllm_config.is_mm_encoder_only
    )
    if settings.missing_features == "refuse" and not only_consumes:
        raise ValueError(
            "missing_features='refuse' is for an engine with the ec_role 'ec_consumer' and without "
            "--mm-encoder-only: any other encodes its images"
        )

# SPDX-License-Identifier: Apache-2.0
"""Limits of a start on a card: a known configuration where there is one, and the KV cache's blocks.

A model of no known configuration starts with the platform's defaults; what is beyond what cards are
known to run is warned of and not refused.
"""

import platform
from typing import TYPE_CHECKING

from vllm_spyre_mm.config import (
    BLOCK_SIZE,
    CARD_MAX_BATCH_TKV,
    DEFAULT_MAX_NUM_SEQS,
    SpyreSettings,
    decoder_dtype_of,
)
from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.model_executor.card.kv_blocks import CardCache
from vllm_spyre_mm.model_executor.card.limits import (
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    KnownConfiguration,
    KnownModel,
    find_known_model,
)
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)


def take_known_configuration(
    vllm_config: "VllmConfig", mapping: MMUtils, settings: SpyreSettings
) -> SpyreSettings:
    """Take the limits that the user did not give from a known configuration, and say so.

    Args:
        vllm_config: changed in place.
        mapping: of the model.
        settings: not resolved yet.

    Returns:
        The settings, with the configuration's bound on batch times padded length if they had none.
    """
    model = _known_model(mapping)
    model_config, scheduler_config = vllm_config.model_config, vllm_config.scheduler_config
    cards = vllm_config.parallel_config.tensor_parallel_size
    length_given = model_config.original_max_model_len not in (None, -1)
    # Arguments may be copied with another number in place of the default one.
    default_seqs = scheduler_config.max_num_seqs == DEFAULT_MAX_NUM_SEQS
    seqs_given = settings.max_num_seqs_given or not default_seqs
    if model is None or (length_given and seqs_given):
        return _with_known_bound(model, vllm_config, settings)
    known = model.default(
        cards,
        model_config.max_model_len if length_given else None,
        scheduler_config.max_num_seqs if seqs_given else None,
    )
    if known is None:
        return settings
    if not length_given:
        model_config.max_model_len = known.max_model_len
    if not seqs_given:
        scheduler_config.max_num_seqs = known.max_num_seqs
    logger.info(
        "%s is known to run on a card with %s: --max-model-len is %d and --max-num-seqs %d",
        model.name,
        known,
        model_config.max_model_len,
        scheduler_config.max_num_seqs,
    )
    return _with_known_bound(model, vllm_config, settings)


def _with_known_bound(
    model: KnownModel | None, vllm_config: "VllmConfig", settings: SpyreSettings
) -> SpyreSettings:
    """The settings with the bound of the known configuration that has these very sizes."""
    if model is None or settings.max_batch_tkv is not None:
        return settings
    asked = _asked(vllm_config, max_batch_tkv=1)
    for known in model.configurations:
        if known.has_sizes_of(asked):
            return settings.model_copy(update={"max_batch_tkv": known.max_batch_tkv})
    return settings


def size_card_cache(vllm_config: "VllmConfig", mapping: MMUtils, settings: SpyreSettings) -> None:
    """Give the KV cache its final number of blocks, and warn of limits that no card is known with.

    The number is put where ``--num-gpu-blocks-override`` is: vLLM asks for no memory then.

    Raises:
        ValueError: the user gives too few blocks, or too little memory.
    """
    assert settings.max_batch_tkv is not None, "resolved before"
    asked = _asked(vllm_config, settings.max_batch_tkv)
    model = _known_model(mapping)
    _warn_of_limits(model, asked)
    cache = CardCache(BLOCK_SIZE, asked.max_model_len, asked.max_num_seqs, settings.max_batch_tkv)
    config = vllm_config.cache_config
    if config.num_gpu_blocks_override is not None:
        blocks = cache.from_override(config.num_gpu_blocks_override)
    elif config.kv_cache_memory_bytes is not None:
        options, dtype = mapping.kv_cache_options(for_card=True), decoder_dtype_of(vllm_config)
        token_bytes = options.token_bytes(dtype) // asked.tensor_parallel_size
        blocks = cache.from_bytes(config.kv_cache_memory_bytes, token_bytes * BLOCK_SIZE)
    else:
        blocks = cache.default(model.num_blocks(asked) if model is not None else None)
    config.num_gpu_blocks_override = blocks


def _known_model(mapping: MMUtils) -> KnownModel | None:
    return find_known_model(mapping.text_config, platform.machine())


def _asked(vllm_config: "VllmConfig", max_batch_tkv: int) -> KnownConfiguration:
    """What the start asks for, in the form of a known configuration."""
    return KnownConfiguration(
        vllm_config.parallel_config.tensor_parallel_size,
        vllm_config.model_config.max_model_len,
        vllm_config.scheduler_config.max_num_seqs,
        max_batch_tkv=max_batch_tkv,
    )


def _warn_of_limits(model: KnownModel | None, asked: KnownConfiguration) -> None:
    """One warning if these limits are beyond every known configuration, or of any model."""
    if model is not None:
        if not any(known.holds(asked) for known in model.configurations):
            logger.warning(
                "no card is known to run %s with %s and max_batch_tkv=%d; the nearest known "
                "configuration is %s and max_batch_tkv=%d",
                model.name,
                asked,
                asked.max_batch_tkv,
                model.nearest(asked),
                model.nearest(asked).max_batch_tkv,
            )
        return
    limits = KnownConfiguration(asked.tensor_parallel_size, MAX_MODEL_LEN, MAX_NUM_SEQS)
    if not limits.holds(asked):
        logger.warning(
            "no card is known to run more than --max-num-seqs %d, --max-model-len %d and "
            "max_batch_tkv=%d with a model that is in no known configuration; this start asks for "
            "%d, %d and %d",
            MAX_NUM_SEQS,
            MAX_MODEL_LEN,
            CARD_MAX_BATCH_TKV,
            asked.max_num_seqs,
            asked.max_model_len,
            asked.max_batch_tkv,
        )
